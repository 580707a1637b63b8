"""A gRPC server as one object: bound port, health, reflection, limits, and an orderly end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from core.errors import ConfigError
from core.malformed import RefuseMalformed

log = logging.getLogger(__name__)

MESSAGE_BYTES_MAX = 16 * 2**20

# One idle peer must be noticed, and a stream that only listens must not be cut for being quiet.
KEEPALIVE_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # Of the transport's own pings too: one of them unanswered holds the keepalive ping back, for a minute by default.
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.http2.max_pings_without_data", 0),
)
_SERVER_OPTIONS: tuple[tuple[str, Any], ...] = (
    *KEEPALIVE_OPTIONS,
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.max_ping_strikes", 0),
)


@dataclass(frozen=True, slots=True)
class Registration:
    """One servicer and how to add it: `Registration("tandem.v1.Kv", add_KvServicer_to_server, servicer)`."""

    name: str
    add: Callable[[Any, grpc.aio.Server], None]
    servicer: object


class GrpcServer:
    """An async context manager: listening inside the block, drained at its end.

    `address` is what clients can dial once entered (port 0 resolved). Raises ConfigError when the port is taken.
    `shared`: other processes of ours may listen at it too, and each gets its part of the connections.
    """

    def __init__(
        self,
        address: str,
        registrations: Sequence[Registration],
        *,
        grace_s: float = 1.0,
        message_bytes_max: int = MESSAGE_BYTES_MAX,
        shared: bool = False,
    ) -> None:
        self.address = address
        self._registrations = tuple(registrations)
        self._grace_s = grace_s
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._server = grpc.aio.server(
            interceptors=(RefuseMalformed(),),
            options=(
                *_SERVER_OPTIONS,
                ("grpc.so_reuseport", int(shared)),  # unless it is meant so, a port in use must be an error
                ("grpc.max_receive_message_length", message_bytes_max),
                ("grpc.max_send_message_length", -1),
            ),
        )

    async def __aenter__(self) -> GrpcServer:
        for registration in self._registrations:
            registration.add(registration.servicer, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = tuple(registration.name for registration in self._registrations)
        reflection.enable_server_reflection((*names, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        host = self.address.rpartition(":")[0]
        try:
            port = self._server.add_insecure_port(self.address)
        except RuntimeError:
            port = 0
        if port == 0:
            raise ConfigError(f"cannot listen on {self.address}: the port is in use or the address is not of this machine")
        self.address = f"{host}:{port}"
        await self._server.start()
        await self.set_serving(True)
        return self

    async def turn_away(self, grace_s: float) -> None:
        """New calls go elsewhere from now on: clients are told, the port is given up. Returns when the calls under way have
        ended or, after `grace_s`, were cut off."""
        await self._server.stop(grace_s)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._health.enter_graceful_shutdown()
        await self._server.stop(self._grace_s)

    async def set_serving(self, serving: bool) -> None:
        """What the standard health service answers, for the whole server and for each service."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", *(registration.name for registration in self._registrations)):
            await self._health.set(name, status)


def serve(
    address: str,
    *registrations: Registration,
    grace_s: float = 1.0,
    message_bytes_max: int = MESSAGE_BYTES_MAX,
    shared: bool = False,
) -> GrpcServer:
    """`async with serve("127.0.0.1:0", Registration(...)) as server: server.address`."""
    return GrpcServer(address, registrations, grace_s=grace_s, message_bytes_max=message_bytes_max, shared=shared)
