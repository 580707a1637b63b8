"""Connections to a Redis in each of its forms, with our deadlines and one kind of error."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol, TypeVar

from redis import exceptions
from redis.asyncio import BlockingConnectionPool, Connection, Redis, Sentinel, SSLConnection
from redis.asyncio import UnixDomainSocketConnection as UnixConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from kvtransfer.directory import DirectoryError
from kvtransfer.redis_layout import Buckets, Lookup
from kvtransfer.redis_scripts import Script
from kvtransfer.redis_url import RedisTarget
from tandem.cancelling import heed_cancellation

log = logging.getLogger(__name__)

CONNECTIONS_MAX = 16
CLOSE_TIMEOUT_S = 2.0
# RuntimeError: what asyncio says of a transport that is closed.
FAULTS = (
    exceptions.RedisError,
    OSError,
    EOFError,
    TimeoutError,
    RuntimeError,
)
_CONNECTION = Connection()  # never connected: it packs

_T = TypeVar("_T")


class RedisLink(Protocol):
    """Calls end within the deadline they are given and raise DirectoryError, nothing else."""

    async def read(
        self, prefix: bytes, lookup: Lookup, script: Script, args: Sequence[Any], timeout_s: float
    ) -> tuple[Buckets, Any]:
        """The buckets of `lookup` and what `script` answers, in one round trip. Without args the script is not asked."""
        ...

    async def run(self, prefix: bytes, script: Script, args: Sequence[Any], timeout_s: float) -> Any: ...

    async def close(self) -> None: ...


def open_link(target: RedisTarget, timeout_s: float) -> RedisLink:
    """Connects when first used."""
    if target.kind == "cluster":
        from kvtransfer.redis_cluster import ClusterLink

        return ClusterLink(target, timeout_s)
    if target.kind == "sentinel":
        master, sentinels = _by_sentinel(target, timeout_s)
        return SingleLink(master, str(target), sentinels)
    if target.kind == "unix":
        pool = _pool(target, timeout_s, connection_class=UnixConnection, path=target.path)
        return SingleLink(Redis.from_pool(pool), str(target))
    return direct_link(target, *target.hosts[0], timeout_s)


def direct_link(target: RedisTarget, host: str, port: int, timeout_s: float) -> SingleLink:
    """To one server, with the login and TLS of `target`."""
    kind = SSLConnection if target.tls else Connection
    pool = _pool(target, timeout_s, connection_class=kind, host=host, port=port, **target.tls)
    return SingleLink(Redis.from_pool(pool), f"{host}:{port}")


def _pool(target: RedisTarget, timeout_s: float, **place: Any) -> BlockingConnectionPool:
    arguments: dict[str, Any] = {**_common(timeout_s), **target.login, "db": target.db, **place}
    return BlockingConnectionPool(max_connections=CONNECTIONS_MAX, timeout=timeout_s, **arguments)


def _by_sentinel(target: RedisTarget, timeout_s: float) -> tuple[Redis, Sequence[Redis]]:
    tls = {"ssl": True, **target.tls} if target.tls else {}
    common = _common(timeout_s)
    halved = {
        "socket_timeout": timeout_s / 2,
        "socket_connect_timeout": timeout_s / 2,
    }  # one that stalls leaves time for the next
    sentinel = Sentinel(  # type: ignore[no-untyped-call]
        target.hosts, sentinel_kwargs={**common, **halved, **target.sentinel_login, **tls}, **common, **tls
    )
    login: dict[str, Any] = {**target.login, "db": target.db}
    master: Redis = sentinel.master_for(target.service, max_connections=CONNECTIONS_MAX, **login)
    return master, sentinel.sentinels


def _common(timeout_s: float) -> dict[str, Any]:
    return {
        "socket_timeout": None,  # deadlines are ours, see Calls
        "socket_connect_timeout": timeout_s,
        "protocol": 2,
        "retry": Retry(NoBackoff(), 1),  # a pooled connection may have died unnoticed: once more
    }


def has_answered(error: DirectoryError) -> bool:
    """Whether Redis itself said no, so that it is there."""
    return isinstance(error.__cause__, exceptions.ResponseError)


class Calls:
    """Calls under way on a link: each has a deadline, faults become DirectoryError, and at the end all are cut short."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._open: set[asyncio.Timeout] = set()
        self._ended = False

    async def run(self, call: Callable[[], Awaitable[_T]], timeout_s: float) -> _T:
        if self._ended:
            raise DirectoryError(f"redis {self._name}: the connection was closed")
        try:
            async with asyncio.timeout(timeout_s) as deadline:
                self._open.add(deadline)
                try:
                    return await call()
                finally:
                    self._open.discard(deadline)
        except FAULTS as error:
            raise DirectoryError(f"redis {self._name}: {error or type(error).__name__}") from error
        except asyncio.CancelledError:
            heed_cancellation()  # nobody cancelled us: the connection was closed under the call
            raise DirectoryError(f"redis {self._name}: the connection was closed") from None

    async def end(self) -> None:
        """Returns when none is under way any more, or after a moment."""
        self._ended = True
        loop = asyncio.get_running_loop()
        for deadline in self._open:
            deadline.reschedule(loop.time())
        gives_up = loop.time() + CLOSE_TIMEOUT_S
        while self._open and loop.time() < gives_up:  # noqa: ASYNC110
            await asyncio.sleep(0.001)


class SingleLink:
    """One server, or the master that Sentinels name."""

    def __init__(self, client: Redis, name: str, helpers: Sequence[Redis] = ()) -> None:
        """`helpers` are closed with it."""
        self._client = client
        self._helpers = helpers
        self._name = name
        self._calls = Calls(name)

    async def read(
        self, prefix: bytes, lookup: Lookup, script: Script, args: Sequence[Any], timeout_s: float
    ) -> tuple[Buckets, Any]:
        commands = lookup.commands()
        parts = len(commands)
        if args:
            commands += _CONNECTION.pack_command("EVALSHA", script.sha, 1, prefix, *args)
        wire = b"".join(commands)
        buckets, answer = await self._calls.run(lambda: self._exchange(wire, parts, bool(args)), timeout_s)
        if isinstance(answer, exceptions.NoScriptError):
            answer = await self.run(prefix, script, args, timeout_s)
        if isinstance(answer, Exception):
            raise DirectoryError(f"redis {self._name}: {answer}") from answer
        return buckets, answer

    async def run(self, prefix: bytes, script: Script, args: Sequence[Any], timeout_s: float) -> Any:
        return await self._calls.run(lambda: _evaluated(self._client, prefix, script, args), timeout_s)

    async def command(self, words: Sequence[Any], timeout_s: float) -> Any:
        return await self._calls.run(lambda: self._client.execute_command(*words), timeout_s)  # type: ignore[no-untyped-call]

    async def close(self) -> None:
        await self._calls.end()
        for client in (self._client, *self._helpers):
            await _closed(client.aclose())

    async def _exchange(self, wire: bytes, portions: int, more: bool) -> tuple[Buckets, Any]:
        """Sends commands that are packed already. A pooled connection may have died unnoticed: then once more on a new one."""
        pool = self._client.connection_pool
        connection = await pool.get_connection()  # type: ignore[no-untyped-call]
        try:
            try:
                return await _answered(connection, wire, portions, more)
            except exceptions.ConnectionError:
                return await _answered(connection, wire, portions, more)
        finally:
            await pool.release(connection)


async def _evaluated(client: Any, prefix: bytes, script: Script, args: Sequence[Any]) -> Any:
    try:
        return await client.execute_command("EVALSHA", script.sha, 1, prefix, *args)
    except exceptions.NoScriptError:
        return await client.execute_command("EVAL", script.text, 1, prefix, *args)


async def _closed(closing: Awaitable[None]) -> None:
    """Connections that do not close in time are left to the end of the process."""
    try:
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await closing
    except FAULTS as error:
        log.debug("closing a connection to redis: %s", error)


async def _answered(connection: Any, wire: bytes, portions: int, more: bool) -> tuple[Buckets, Any]:
    """So many portions of buckets, then, where there is one `more`, what the last command answered; else an empty list.

    An error that Redis answers takes the place of what the last command answered, the first one if there are several.
    Anything else leaves the connection disconnected.
    """
    buckets, answer, error = Buckets(), list[Any](), None
    await connection.send_packed_command(wire)
    for number in range(portions + more):
        try:
            answer = await connection.read_response(disconnect_on_error=False)
        except exceptions.ResponseError as said:
            error = error or said
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        else:
            if number < portions:
                buckets.take(answer)
    return buckets, error or (answer if more else [])
