"""Serves an ASGI application on a port we know, inside a process whose signals belong to somebody else."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
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


@contextlib.asynccontextmanager
async def web_server(app: Any, address: str, grace_s: float) -> AsyncIterator[str]:
    """Listening inside the block; yields the address with its port resolved. On leaving, connections get `grace_s`.

    Raises ConfigError when the address cannot be bound.
    """
    sock = _bind(address)
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
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[sock]), name="http")
    try:
        host, port = sock.getsockname()[:2]
        yield f"{host}:{port}"
    finally:
        server.end()
        await task
        sock.close()


def _bind(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host.strip("[]"), int(port)))
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    except (OSError, ValueError, OverflowError) as error:
        sock.close()
        raise ConfigError(f"cannot listen for HTTP on {address}: {error}; choose another router.http") from None
    return sock
