"""Directories in each of their forms, and whatever stands between them and Redis."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from itertools import count
from pathlib import Path

from redis import Redis
from redis.exceptions import RedisError

from cli.redis_server import RedisServer, redis_server
from cluster.directory_service import directory_registration
from core.blocks import BlockKey, KvLayout, KvSource
from core.clock import SystemClock
from core.request import WorkerRole
from core.service import serve
from kvtransfer.directory import Directory, Located, NodeRecord, Tier
from kvtransfer.local_directory import ClockedDirectory, LocalDirectory
from kvtransfer.redis_directory import RedisDirectory
from kvtransfer.remote_directory import RemoteDirectory

FORMS = ("local", "remote", "redis", "redis cluster")
TTL_S = 30.0
TIMEOUT_S = 10.0  # far more than any call takes: these tests run beside others
DEADLINE_S = 30.0
LAYOUT = KvLayout(b"\x01" * 16, "float32", 2, 2, 8, 16)
Make = Callable[[], Directory]
_prefixes = count()


def record(worker_id: str = "a", epoch: int = 1, address: str = "", layout: KvLayout | None = LAYOUT) -> NodeRecord:
    source = KvSource(worker_id, epoch, address or f"{worker_id}:1", "host-0", "/arena", 64, ("shm", "grpc"), f"{worker_id}:2")
    return NodeRecord(source, layout, WorkerRole.STORE)


def keys(number: int, seed: int = 0) -> list[BlockKey]:
    return [random.Random(f"{seed}/{n}").randbytes(16) for n in range(number)]


def dram(some: Sequence[BlockKey]) -> list[tuple[BlockKey, Tier]]:
    return [(key, Tier.DRAM) for key in some]


def disk(some: Sequence[BlockKey]) -> list[tuple[BlockKey, Tier]]:
    return [(key, Tier.DISK) for key in some]


def shown(found: Located) -> list[set[tuple[str, int, Tier]]]:
    """The holders of each key; checks that each of them has its record."""
    assert set(found.nodes) == {holder.worker_id for held in found.holders for holder in held}
    for held in found.holders:
        assert held, "nobody is no holder"
        assert len(set(held)) == len(held), "a holder is named twice"
        assert all(found.nodes[holder.worker_id].source.epoch == holder.epoch for holder in held)
    return [set(map(tuple, held)) for held in found.holders]


async def until(check: Callable[[], Awaitable[object]]) -> None:
    """Waits until the (asynchronous) check holds."""
    async with asyncio.timeout(DEADLINE_S):
        while not await check():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@asynccontextmanager
async def directories(form: str, redis_url: str) -> AsyncIterator[Make]:
    """Yields what makes clients of one and the same, empty directory."""
    made: list[Directory] = []

    def keep(directory: Directory) -> Directory:
        made.append(directory)
        return directory

    try:
        if form == "local":
            table = LocalDirectory()
            yield lambda: keep(ClockedDirectory(table, SystemClock()))
            table.check()
        elif form == "remote":
            async with serve("127.0.0.1:0", directory_registration(LocalDirectory(), SystemClock())) as server:
                yield lambda: keep(RemoteDirectory(server.address, timeout_s=TIMEOUT_S))
        else:
            url = fresh(redis_url)
            yield lambda: keep(RedisDirectory(url, timeout_s=TIMEOUT_S))
    finally:
        for directory in made:
            await directory.close()


def fresh(redis_url: str) -> str:
    """A directory of its own on that server."""
    return f"{redis_url}?prefix=t{next(_prefixes)}"


@contextmanager
def redis_cluster(masters: int = 3) -> Iterator[str]:
    """A Redis Cluster without replicas; yields its URL."""
    options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "5000", "--cluster-require-full-coverage", "yes")
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(redis_server(low_port(), options)) for _ in range(masters)]
        clients = [stack.enter_context(Redis(port=server.port)) for server in servers]
        for at, client in enumerate(clients):
            client.execute_command("CLUSTER", "ADDSLOTS", *range(at * 16384 // masters, (at + 1) * 16384 // masters))
            client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", at + 1)
        for server in servers[1:]:
            clients[0].execute_command("CLUSTER", "MEET", "127.0.0.1", server.port)
        wait(lambda: all(agrees(client, masters) for client in clients))
        yield "redis+cluster://" + ",".join(f"127.0.0.1:{server.port}" for server in servers)


def agrees(client: Redis, masters: int) -> bool:
    info: bytes = client.execute_command("CLUSTER", "INFO")
    return b"cluster_state:ok" in info and b"cluster_known_nodes:%d\r" % masters in info


def low_port() -> int:
    """A free port whose neighbour, 10,000 above, a cluster's own traffic can use."""
    while True:
        port = random.randint(20_000, 30_000)
        with socket.socket() as one, socket.socket() as other, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            other.bind(("127.0.0.1", port + 10_000))
            return port


def wait(check: Callable[[], bool]) -> None:
    """As `until`, for what is started outside of a loop."""
    ends = time.monotonic() + DEADLINE_S
    while True:
        with contextlib.suppress(RedisError):
            if check():
                return
        assert time.monotonic() < ends, "it did not happen in time"
        threading.Event().wait(0.02)


class Proxy:
    """Relays connections to a server, over TLS when given a context; can stop relaying while connections stay up."""

    def __init__(self, port: int, context: ssl.SSLContext | None = None) -> None:
        self._target = port
        self._context = context
        self._flows = asyncio.Event()
        self._flows.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self.port = 0

    async def __aenter__(self) -> Proxy:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._context)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.cut()
        self._flows.set()
        await self._server.wait_closed()
        await until(self._quiet)

    async def _quiet(self) -> bool:
        self.cut()  # those that were accepted at the last moment, too
        return not self._writers

    def stall(self) -> None:
        self._flows.clear()

    def flow(self) -> None:
        self._flows.set()

    def cut(self) -> None:
        """Ends the connections there are."""
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            upstream_reader, upstream = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, upstream}
        try:
            await asyncio.gather(self._relay(reader, upstream), self._relay(upstream_reader, writer))
        finally:
            for one in (writer, upstream):
                one.transport.abort()
            self._writers -= {writer, upstream}

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                await self._flows.wait()
                writer.write(data)
                await writer.drain()
            writer.transport.abort()


@contextmanager
def sentinel(server: RedisServer, service: str, folder: Path) -> Iterator[str]:
    """A Sentinel that watches `server`; yields the URL to ask it by."""
    conf = folder / "sentinel.conf"
    conf.write_text(f"sentinel monitor {service} 127.0.0.1 {server.port} 1\n")
    with redis_server(options=("--sentinel",), config=conf) as watcher:
        yield f"redis+sentinel://127.0.0.1:{watcher.port}/{service}"
