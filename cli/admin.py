"""Calls to a cluster's admin address."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import grpc

from cluster.report import ClusterSnapshot
from cluster.wire import snapshot_from_pb
from core.request import WorkerRole
from core.wire import role_to_pb
from tandem._convert import error_from_rpc
from tandem.errors import InvalidRequestError, NotFoundError, UnavailableError
from tandem.v1 import cluster_pb2 as pb
from tandem.v1 import cluster_pb2_grpc as stubs

TIMEOUT_S = 10.0
_T = TypeVar("_T")


def status(address: str) -> ClusterSnapshot:
    return snapshot_from_pb(_ask(address, lambda stub: stub.GetStatus(pb.GetStatusRequest(), timeout=TIMEOUT_S)))


def drain(address: str, target: str, deadline_s: float) -> str:
    request = pb.DrainRequest(target=target, deadline_s=deadline_s)
    answer = _ask(address, lambda stub: stub.Drain(request, timeout=TIMEOUT_S))
    if not answer.found:
        raise NotFoundError(answer.detail)
    return str(answer.detail)


def set_role(address: str, target: str, role: WorkerRole) -> str:
    request = pb.SetRoleRequest(target=target, role=role_to_pb(role))
    answer = _ask(address, lambda stub: stub.SetRole(request, timeout=TIMEOUT_S))
    if not answer.found:
        raise NotFoundError(answer.detail)
    return str(answer.detail)


def shut_down(address: str) -> None:
    _ask(address, lambda stub: stub.Shutdown(pb.ShutdownRequest(), timeout=TIMEOUT_S))


def _ask(address: str, call: Callable[[Any], _T]) -> _T:
    with grpc.insecure_channel(address, options=(("grpc.enable_http_proxy", 0),)) as channel:
        try:
            return call(stubs.ClusterStub(channel))  # type: ignore[no-untyped-call]
        except grpc.RpcError as error:
            match error.code():
                case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.DEADLINE_EXCEEDED:
                    raise UnavailableError(f"nobody answers at {address}; is the cluster running?") from None
                case grpc.StatusCode.UNIMPLEMENTED:
                    raise UnavailableError(
                        f"{address} does not answer questions about the cluster; give its admin address (--admin HOST:PORT)"
                    ) from None
                case grpc.StatusCode.FAILED_PRECONDITION:
                    raise InvalidRequestError(error.details() or "refused") from None
            raise error_from_rpc(error, address) from None
