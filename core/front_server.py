"""A gRPC server for what streams many small messages to many clients: `core.service.GrpcServer` on our own HTTP/2.

The same life cycle, health and reflection. It has no keepalive options to set: who is silent while a call runs is pinged.
"""

from __future__ import annotations

import asyncio
import logging
from types import TracebackType
from typing import Any

from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc
from grpc_reflection.v1alpha._async import ReflectionServicer

from core.grpc_calls import Methods
from core.listen import bind
from core.service import MESSAGE_BYTES_MAX, Registration

log = logging.getLogger(__name__)

FLUSH_S = 0.5
"""For last words to leave before a connection is cut."""


class FrontServer:
    """An async context manager: listening inside the block, drained at its end.

    `address` is what clients can dial once entered (port 0 resolved). Raises ConfigError when the port is taken.
    `shared`: other processes of ours may listen at it too, and each gets its part of the connections.
    """

    def __init__(
        self,
        address: str,
        *registrations: Registration,
        grace_s: float = 1.0,
        message_bytes_max: int = MESSAGE_BYTES_MAX,
        shared: bool = False,
    ) -> None:
        self.address = address
        self._registrations = registrations
        self._grace_s = grace_s
        self._shared = shared
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._methods = Methods(message_bytes_max)
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> FrontServer:
        methods: Any = self._methods
        for registration in self._registrations:
            registration.add(registration.servicer, methods)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, methods)
        names = (*(r.name for r in self._registrations), health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(ReflectionServicer(names), methods)
        sock, self.address = bind(self.address, "gRPC", shared=self._shared)
        self._server = await asyncio.get_running_loop().create_server(self._methods.connect, sock=sock)
        await self.set_serving(True)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._health.enter_graceful_shutdown()
        await self.turn_away(self._grace_s)

    async def set_serving(self, serving: bool) -> None:
        """What the standard health service answers, for the whole server and for each service."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", *(registration.name for registration in self._registrations)):
            await self._health.set(name, status)

    async def turn_away(self, grace_s: float) -> None:
        """New calls go elsewhere from now on: clients are told, the port is given up. Returns when the calls under way have
        ended or, after `grace_s`, were cut off."""
        methods = self._methods
        if self._server is not None:
            self._server.close()
        methods.leaving = True
        for connection in tuple(methods.connections):
            connection.leave()
        if running := tuple(methods.running):
            await asyncio.wait(running, timeout=grace_s)
        if running := tuple(methods.running):
            for task in running:
                task.cancel()
            await asyncio.wait(running, timeout=FLUSH_S)
        for connection in tuple(methods.connections):
            connection.close()
        try:
            async with asyncio.timeout(FLUSH_S):
                await methods.nobody.wait()
        except TimeoutError:  # of clients that take no last words
            for connection in tuple(methods.connections):
                connection.abort()
            await methods.nobody.wait()
