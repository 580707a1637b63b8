"""The Cluster service on the admin address: workers report, routers watch, operators ask."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from cluster.controller import Controller, Orders
from cluster.wire import snapshot_to_pb
from core.errors import ConfigError, InvalidRequestError, NotFoundError, StaleEpochError
from core.report_wire import report_from_pb
from core.service import Registration
from core.wire import role_from_pb, role_to_pb
from tandem.v1 import cluster_pb2 as pb
from tandem.v1 import cluster_pb2_grpc as pb_grpc

NOTHING = Orders()
WATCH_GAP_S = 0.02
"""Changes closer together than this reach a watcher as one snapshot."""


class ClusterServicer(pb_grpc.ClusterServicer):
    """`on_shutdown` is called when an operator asks the cluster to end."""

    def __init__(self, controller: Controller, heartbeat_s: float, on_shutdown: Callable[[], None]) -> None:
        self._controller = controller
        self._heartbeat_s = heartbeat_s
        self._on_shutdown = on_shutdown

    async def Report(
        self, requests: AsyncIterator[pb.WorkerReport], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.ReportReply]:
        async for message in requests:
            try:
                orders = self._controller.reported(report_from_pb(message))
            except StaleEpochError as error:
                await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
            except InvalidRequestError as error:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            if orders != NOTHING:
                role = role_to_pb(orders.role) if orders.role is not None else None
                yield pb.ReportReply(drain=orders.drain_s is not None, drain_deadline_s=orders.drain_s or 0.0, role=role)

    async def Watch(
        self, request: pb.WatchRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.ClusterSnapshot]:
        version = -1
        while True:
            snapshot = await self._controller.changed(version, self._heartbeat_s)
            version = snapshot.version
            yield snapshot_to_pb(snapshot)
            await asyncio.sleep(WATCH_GAP_S)

    async def GetStatus(self, request: pb.GetStatusRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.ClusterSnapshot:
        return snapshot_to_pb(self._controller.snapshot())

    async def Drain(self, request: pb.DrainRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.DrainResponse:
        try:
            return pb.DrainResponse(found=True, detail=self._controller.drain(request.target, request.deadline_s))
        except NotFoundError as error:
            return pb.DrainResponse(found=False, detail=str(error))
        except ConfigError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
            raise  # unreachable: abort raises

    async def SetRole(self, request: pb.SetRoleRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.SetRoleResponse:
        try:
            return pb.SetRoleResponse(found=True, detail=self._controller.set_role(request.target, role_from_pb(request.role)))
        except NotFoundError as error:
            return pb.SetRoleResponse(found=False, detail=str(error))
        except InvalidRequestError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except ConfigError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        raise AssertionError("abort raises")

    async def Shutdown(self, request: pb.ShutdownRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.ShutdownResponse:
        self._on_shutdown()
        return pb.ShutdownResponse()


def cluster_registration(servicer: ClusterServicer) -> Registration:
    return Registration("tandem.v1.Cluster", pb_grpc.add_ClusterServicer_to_server, servicer)
