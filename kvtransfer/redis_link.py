"""Connections to a Redis in each of its forms, with our deadlines and one kind of error."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Awaitable, Sequence
from typing import Any, Protocol, TypeVar

from redis import exceptions
from redis.asyncio import BlockingConnectionPool, Connection, Redis, RedisCluster, Sentinel, SSLConnection
from redis.asyncio import UnixDomainSocketConnection as UnixConnection
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from core.errors import ConfigError
from kvtransfer.directory import DirectoryError
from kvtransfer.redis_layout import Lookup
from kvtransfer.redis_scripts import CHECK, Script
from kvtransfer.redis_url import RedisTarget, parse_redis_url
from tandem.cancelling import heed_cancellation

log = logging.getLogger(__name__)

CONNECTIONS_MAX = 16
CLOSE_TIMEOUT_S = 1.0
# RuntimeError: what asyncio says of a transport that is closed.
_FAULTS = (
    exceptions.RedisError,
    OSError,
    EOFError,
    TimeoutError,
    RuntimeError,
)
_REFUSED = (exceptions.AuthenticationError, exceptions.AuthorizationError, exceptions.NoPermissionError)

_CONNECTION = Connection()  # never connected: it packs

_T = TypeVar("_T")


class RedisLink(Protocol):
    """Calls end within the deadline they are given and raise DirectoryError, nothing else."""

    async def read(
        self, prefix: bytes, lookup: Lookup, script: Script, args: Sequence[Any], timeout_s: float
    ) -> tuple[list[bytes | None], Any]:
        """The buckets of `lookup` and what `script` answers, in one round trip. Without args the script is not asked."""
        ...

    async def run(self, prefix: bytes, script: Script, args: Sequence[Any], timeout_s: float) -> Any: ...

    async def close(self) -> None: ...


def open_link(target: RedisTarget, timeout_s: float) -> RedisLink:
    """Connects when first used."""
    common: dict[str, Any] = {
        "socket_timeout": None,  # deadlines are ours, see _in_time
        "socket_connect_timeout": timeout_s,
        "protocol": 2,
        "retry": Retry(NoBackoff(), 1),  # a pooled connection may have died unnoticed: once more
    }
    if target.kind == "cluster":
        return ClusterLink(target, {**common, **target.login, **_cluster_tls(target)})
    return SingleLink(_single(target, timeout_s, {**common, **target.login, **target.tls, "db": target.db}), str(target))


def _single(target: RedisTarget, timeout_s: float, arguments: dict[str, Any]) -> Redis:
    if target.kind == "sentinel":
        asked = {name: value for name, value in arguments.items() if name not in ("db", "username", "password")}
        asked |= {"socket_timeout": timeout_s / 2, "socket_connect_timeout": timeout_s / 2}  # leaves time to ask another one
        tls = {"ssl": True} if target.tls else {}
        sentinel = Sentinel(  # type: ignore[no-untyped-call]
            target.hosts, sentinel_kwargs={**asked, **target.sentinel_login, **tls}, **arguments, **tls
        )
        master: Redis = sentinel.master_for(target.service, max_connections=CONNECTIONS_MAX)
        return master
    if target.kind == "unix":
        place: dict[str, Any] = {"connection_class": UnixConnection, "path": target.path}
    else:
        (host, port) = target.hosts[0]
        place = {"connection_class": SSLConnection if target.tls else Connection, "host": host, "port": port}
    pool = BlockingConnectionPool(max_connections=CONNECTIONS_MAX, timeout=timeout_s, **place, **arguments)
    return Redis.from_pool(pool)


def _cluster_tls(target: RedisTarget) -> dict[str, Any]:
    return {"ssl": True, **target.tls} if target.tls else {}


class SingleLink:
    """One server, or the master that Sentinels name."""

    def __init__(self, client: Redis, name: str) -> None:
        self._client = client
        self._name = name

    async def read(
        self, prefix: bytes, lookup: Lookup, script: Script, args: Sequence[Any], timeout_s: float
    ) -> tuple[list[bytes | None], Any]:
        commands = [lookup.command()]
        if args:
            commands += _CONNECTION.pack_command("EVALSHA", script.sha, 1, prefix, *args)
        buckets, *answer = await _in_time(self._exchange(b"".join(commands), 1 + bool(args)), timeout_s, self._name)
        if answer and isinstance(answer[0], exceptions.NoScriptError):
            answer = [await self.run(prefix, script, args, timeout_s)]
        for reply in (buckets, *answer):
            if isinstance(reply, Exception):
                raise DirectoryError(f"redis {self._name}: {reply}")
        return buckets, answer[0] if answer else []

    async def run(self, prefix: bytes, script: Script, args: Sequence[Any], timeout_s: float) -> Any:
        return await _in_time(_evaluated(self._client, prefix, script, args), timeout_s, self._name)

    async def close(self) -> None:
        await _closed(self._client.aclose())

    async def _exchange(self, wire: bytes, replies: int) -> list[Any]:
        """Sends commands that are packed already. A pooled connection may have died unnoticed: then once more on a new one."""
        pool = self._client.connection_pool
        connection = await pool.get_connection()  # type: ignore[no-untyped-call]
        try:
            try:
                return await _replies(connection, wire, replies)
            except exceptions.ConnectionError:
                return await _replies(connection, wire, replies)
        finally:
            await pool.release(connection)


class ClusterLink:
    def __init__(self, target: RedisTarget, arguments: dict[str, Any]) -> None:
        nodes = [ClusterNode(host, port) for host, port in target.hosts]
        self._client = RedisCluster(startup_nodes=nodes, max_connections=CONNECTIONS_MAX, **arguments)
        self._name = str(target)

    async def read(
        self, prefix: bytes, lookup: Lookup, script: Script, args: Sequence[Any], timeout_s: float
    ) -> tuple[list[bytes | None], Any]:
        buckets, answer = await _in_time(self._both(prefix, lookup, script, args), timeout_s, self._name)
        return buckets, answer

    async def run(self, prefix: bytes, script: Script, args: Sequence[Any], timeout_s: float) -> Any:
        return await _in_time(_evaluated(self._client, prefix, script, args), timeout_s, self._name)

    async def close(self) -> None:
        await _closed(self._client.aclose())

    async def _both(self, prefix: bytes, lookup: Lookup, script: Script, args: Sequence[Any]) -> list[Any]:
        asked = _evaluated(self._client, prefix, script, args) if args else _nothing()
        results = await asyncio.gather(self._buckets(prefix, lookup), asked, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return list(results)

    async def _buckets(self, prefix: bytes, lookup: Lookup) -> list[bytes | None]:
        """Sent to the shard's node by name: finding the slot of each key takes long, and it is the same."""
        await self._client.initialize()
        node = self._client.get_node_from_key(prefix.decode())
        found: list[bytes | None] = await self._client.execute_command("MGET", *lookup.names(), target_nodes=node)
        return found


async def check_redis(url: str, timeout_s: float) -> str:
    """Asks, once, whether a directory can be kept there. Returns what is wrong for now; nothing when all is well.

    Raises ConfigError for what waiting will not mend: a URL that is none, a password refused, commands or keys forbidden, a
    certificate that is not trusted, TLS where there is none, a replica that takes no writes.
    """
    target = parse_redis_url(url)
    link = open_link(target, timeout_s)
    try:
        await link.run(f"{target.prefix}{{0}}".encode(), CHECK, (), timeout_s)
    except DirectoryError as error:
        fault = error.__cause__
        hint = _hint(fault)
        if hint:
            raise ConfigError(f"redis: {target}: {fault}; {hint}") from None
        return f"{target} does not answer: {fault or error.message}"
    finally:
        await link.close()
    return ""


def _hint(fault: BaseException | None) -> str:
    """What to change, for faults that stay."""
    while fault is not None:
        if isinstance(fault, _REFUSED):
            return "check the name and password in its URL and the rights of that user"
        if isinstance(fault, ssl.SSLError):
            return "check that it speaks TLS there, and `ca` and `verify` in its URL"
        if isinstance(fault, exceptions.ReadOnlyError):
            return "this is a replica: name its master, or its Sentinels with redis+sentinel://"
        if isinstance(fault, exceptions.ResponseError) and str(fault).startswith(("NOAUTH", "NOPERM", "WRONGPASS", "MOVED")):
            return "check the name and password in its URL, and redis+cluster:// for a Redis Cluster"
        fault = fault.__cause__ or fault.__context__
    return ""


async def _evaluated(client: Any, prefix: bytes, script: Script, args: Sequence[Any]) -> Any:
    try:
        return await client.execute_command("EVALSHA", script.sha, 1, prefix, *args)
    except exceptions.NoScriptError:
        return await client.execute_command("EVAL", script.text, 1, prefix, *args)


async def _in_time(call: Awaitable[_T], timeout_s: float, name: str) -> _T:
    try:
        async with asyncio.timeout(timeout_s):
            return await call
    except _FAULTS as error:
        raise DirectoryError(f"redis {name}: {error or type(error).__name__}") from error
    except asyncio.CancelledError:
        heed_cancellation()  # nobody cancelled us: the connection was closed under the call
        raise DirectoryError(f"redis {name}: the connection was closed") from None


async def _closed(closing: Awaitable[None]) -> None:
    """Connections that do not close in time are left to the end of the process."""
    try:
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await closing
    except _FAULTS as error:
        log.debug("closing a connection to redis: %s", error)


async def _replies(connection: Any, wire: bytes, count: int) -> list[Any]:
    """Errors that Redis answers stand in place of their reply. Anything else leaves the connection disconnected."""
    found: list[Any] = []
    await connection.send_packed_command(wire)
    for _ in range(count):
        try:
            found.append(await connection.read_response(disconnect_on_error=False))
        except exceptions.ResponseError as error:
            found.append(error)
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
    return found


async def _nothing() -> list[bytes | None]:
    return []
