"""The other routers of the cluster: whichever answers an address that they share, a call about a request reaches its router."""

from __future__ import annotations

import asyncio
import logging
import re
import uuid
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Protocol, TypeVar

import grpc

from core.service import KEEPALIVE_OPTIONS
from tandem.cancelling import heed_cancellation
from tandem.v1 import cluster_pb2
from tandem.v1 import inference_pb2 as pb
from tandem.v1.inference_pb2_grpc import InferenceStub

log = logging.getLogger(__name__)

ASKED_BY_ROUTER = "tandem-asked-by"
"""Metadata of a call that a router passed on: whoever gets it answers for itself alone."""
TIMEOUT_S = 2.0
_OWN_ID = re.compile(r"(.+\.\d+)-[0-9a-f]{32}")
_ALIVE = (cluster_pb2.WORKER_STATE_READY, cluster_pb2.WORKER_STATE_DRAINING)
_T = TypeVar("_T")


class Peers(Protocol):
    """What the gRPC front asks about requests that are not its own."""

    async def cancel(self, request_id: str) -> bool: ...
    async def explain(self, request_id: str) -> pb.ExplainResponse | None: ...


class Alone:
    """There is one router."""

    async def cancel(self, request_id: str) -> bool:
        return False

    async def explain(self, request_id: str) -> pb.ExplainResponse | None:
        return None


class Replicas:
    """`reports`: the newest ones of the cluster. A replica that does not answer is as good as one that knows nothing: with its
    process, what it was asked about is gone too."""

    def __init__(self, router_id: str, epoch: int, reports: Callable[[], Iterable[cluster_pb2.WorkerReport]]) -> None:
        self.name = f"{router_id}.{epoch}"
        self._router_id = router_id
        self._reports = reports
        self._channels: dict[str, grpc.aio.Channel] = {}

    def new_id(self) -> str:
        """A request id that says whose it is."""
        return f"{self.name}-{uuid.uuid4().hex}"

    async def cancel(self, request_id: str) -> bool:
        request = pb.CancelRequest(request_id=request_id)

        async def ask(stub: Any) -> bool:
            reply = await stub.Cancel(request, timeout=TIMEOUT_S, metadata=self._metadata())
            return bool(reply.found)

        return any(await self._ask(request_id, ask))

    async def explain(self, request_id: str) -> pb.ExplainResponse | None:
        request = pb.ExplainRequest(request_id=request_id)

        async def ask(stub: Any) -> pb.ExplainResponse:
            found: pb.ExplainResponse = await stub.Explain(request, timeout=TIMEOUT_S, metadata=self._metadata())
            return found

        return next((found for found in await self._ask(request_id, ask) if found is not None), None)

    async def close(self) -> None:
        channels, self._channels = self._channels, {}
        await asyncio.gather(*(channel.close(None) for channel in channels.values()))

    async def _ask(self, request_id: str, ask: Callable[[Any], Awaitable[_T]]) -> list[_T | None]:
        """What those who may know answered; None of one that knows nothing, or does not answer."""
        addresses = await self._addresses(request_id)
        return await asyncio.gather(*(self._answer(ask, address) for address in addresses))

    async def _answer(self, ask: Callable[[Any], Awaitable[_T]], address: str) -> _T | None:
        channel = self._channels.get(address)
        if channel is None:
            channel = self._channels[address] = grpc.aio.insecure_channel(address, options=KEEPALIVE_OPTIONS)
        try:
            return await ask(InferenceStub(channel))  # type: ignore[no-untyped-call]
        except grpc.aio.AioRpcError as error:
            heed_cancellation()
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                log.warning("the router at %s does not answer: %s", address, error.details())
            return None

    async def _addresses(self, request_id: str) -> list[str]:
        """Of the router that made the id, if it did; of all others for an id that a user chose."""
        others = {
            f"{report.worker_id}.{report.epoch}": report.peer_address
            for report in self._reports()
            if report.peer_address and report.worker_id != self._router_id and report.state in _ALIVE
        }
        for gone in self._channels.keys() - others.values():
            await self._channels.pop(gone).close(None)
        named = _OWN_ID.match(request_id)
        if named is not None and named[1] in others:
            return [others[named[1]]]
        return list(others.values())

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return ((ASKED_BY_ROUTER, self.name),)
