"""Serves an ASGI application on a port we know, inside a process whose signals belong to somebody else."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from types import TracebackType
from typing import Any

import uvicorn

from core.errors import ConfigError
from router.http_connection import BoundedConnection

_BACKLOG = 1024


TICK_S = 1.0  # how often the Date header is renewed


class _Server(uvicorn.Server):
    """Wakes once a second instead of ten times: an idle router is to cost nothing."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._ended = asyncio.Event()

    def end(self) -> None:
        self.should_exit = True
        self._ended.set()

    async def main_loop(self) -> None:
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await self._ended.wait()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # the host decides what a signal means


class WebServer:
    """An async context manager: listening inside the block; on leaving, connections get `grace_s`.

    `address` has its port resolved once entered. `shared`: other processes of ours may listen there too, and each gets its
    part of the connections. Raises ConfigError when the address cannot be bound.
    """

    def __init__(self, app: Any, address: str, grace_s: float, *, shared: bool = False) -> None:
        self.address = address
        self._shared = shared
        config = uvicorn.Config(
            app,
            loop="none",
            http=BoundedConnection,
            lifespan="off",
            access_log=False,
            log_config=None,
            server_header=False,
            timeout_graceful_shutdown=max(1, round(grace_s)),
        )
        self._server = _Server(config)
        self._sock: socket.socket | None = None
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> WebServer:
        sock = self._sock = _bind(self.address, self._shared)
        host, port = sock.getsockname()[:2]
        self.address = f"{host}:{port}"
        self._task = asyncio.create_task(self._server.serve(sockets=[sock]), name="http")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._task is not None
        assert self._sock is not None
        self._server.end()
        try:
            await self._task
        finally:
            self._sock.close()

    def turn_away(self) -> None:
        """New connections go elsewhere from now on; those that stand are served."""
        for server in self._server.servers:
            server.close()


@contextlib.asynccontextmanager
async def web_server(app: Any, address: str, grace_s: float) -> AsyncIterator[str]:
    """A `WebServer`; yields its address."""
    async with WebServer(app, address, grace_s) as server:
        yield server.address


def _bind(address: str, shared: bool) -> socket.socket:
    host, _, port = address.rpartition(":")
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((host.strip("[]"), int(port)))
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    except (OSError, ValueError, OverflowError) as error:
        sock.close()
        raise ConfigError(f"cannot listen for HTTP on {address}: {error}; choose another router.http") from None
    return sock
