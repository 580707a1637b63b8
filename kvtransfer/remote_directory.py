"""The controller's directory, asked over gRPC. It may die and come back: calls fail meanwhile, and then they do not."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, TypeVar, cast

import grpc

from core.blocks import BlockKey
from core.clock import Clock, SystemClock
from core.errors import InvalidRequestError, StaleEpochError, TandemError
from core.service import KEEPALIVE_OPTIONS
from kvtransfer.breaker import Breaker
from kvtransfer.directory import (
    LOCATE_KEYS_MAX,
    DirectoryError,
    DuplicateNodeError,
    Located,
    NodeRecord,
    Tier,
    pack,
    pack_deltas,
)
from kvtransfer.directory_wire import node_from_pb, node_to_pb, runs_from_pb
from kvtransfer.rpc import CODE_METADATA
from tandem.cancelling import heed_cancellation
from tandem.v1 import directory_pb2 as pb
from tandem.v1 import directory_pb2_grpc as pb_grpc

REPLY_BYTES_MAX = 16 * 2**20
_OPTIONS = (
    *KEEPALIVE_OPTIONS,
    ("grpc.max_receive_message_length", REPLY_BYTES_MAX),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.use_local_subchannel_pool", 1),
)
_REFUSALS: dict[str, type[TandemError]] = {kind.code: kind for kind in (StaleEpochError, DuplicateNodeError)}
_AWAY = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED})

_Reply = TypeVar("_Reply")


class RemoteDirectory:
    """Lives in one asyncio loop. While the controller is away, `locate` fails at once but for a try now and then."""

    def __init__(self, address: str, *, timeout_s: float, clock: Clock | None = None) -> None:
        self._address = address
        self._timeout_s = timeout_s
        self._clock = clock or SystemClock()
        self._breaker = Breaker()
        self._channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
        self._stub = pb_grpc.DirectoryStub(self._channel)  # type: ignore[no-untyped-call]
        self._doubted: set[tuple[str, int]] = set()  # an announcement failed, nobody knows how much of it was taken
        self._closed = False

    async def join(self, record: NodeRecord, ttl_s: float) -> bool:
        incarnation = (record.source.worker_id, record.source.epoch)
        if incarnation in self._doubted:
            await self.leave(*incarnation)
        reply: pb.JoinReply = await self._call(self._stub.Join, pb.JoinRequest(node=node_to_pb(record), ttl_s=ttl_s))
        self._doubted.discard(incarnation)
        return reply.known

    async def leave(self, worker_id: str, epoch: int) -> None:
        await self._call(self._stub.Leave, pb.LeaveRequest(worker_id=worker_id, epoch=epoch))

    async def announce(
        self, worker_id: str, epoch: int, added: Sequence[tuple[BlockKey, Tier]], removed: Sequence[tuple[BlockKey, Tier]]
    ) -> bool:
        for delta in pack_deltas(added, removed):
            request = pb.AnnounceRequest(worker_id=worker_id, epoch=epoch, **delta._asdict())
            try:
                reply: pb.AnnounceReply = await self._call(self._stub.Announce, request)
            except BaseException:
                self._doubted.add((worker_id, epoch))
                raise
            if not reply.known:
                return False
        return True

    async def locate(self, keys: Sequence[BlockKey]) -> Located:
        packed = pack(keys[:LOCATE_KEYS_MAX])
        if not self._breaker.allows(self._clock.now()):
            raise DirectoryError(f"the directory at {self._address} did not answer lately; it is left alone for a moment")
        reply = await self._call(self._stub.Locate, pb.LocateRequest(keys=packed))
        return self._sensible(lambda: runs_from_pb(reply, len(keys)).expand())

    async def nodes(self) -> list[NodeRecord]:
        reply = await self._call(self._stub.Nodes, pb.NodesRequest())
        return self._sensible(lambda: [node_from_pb(node) for node in reply.nodes])

    async def close(self) -> None:
        self._closed = True
        await self._channel.close(None)

    async def _call(self, method: Callable[..., Awaitable[_Reply]], request: object) -> _Reply:
        if self._closed:
            raise DirectoryError("this directory was closed")
        try:
            reply = await method(request, timeout=self._timeout_s)
        except grpc.aio.AioRpcError as error:
            heed_cancellation()
            raise self._translated(error) from None
        except asyncio.CancelledError:
            heed_cancellation()  # nobody cancelled us: the channel was closed under the call
            raise DirectoryError("this directory was closed") from None
        self._breaker.succeeded()
        return reply

    def _translated(self, error: grpc.aio.AioRpcError) -> TandemError:
        pairs = cast("Iterable[tuple[str, Any]]", error.trailing_metadata() or ())
        refusal = _REFUSALS.get(dict(pairs).get(CODE_METADATA, ""))
        if refusal is not None:
            return refusal(error.details() or refusal.code)
        if error.code() in _AWAY:
            self._breaker.failed(self._clock.now())
        return DirectoryError(f"the directory at {self._address}: {error.details() or error.code().name}")

    def _sensible(self, read: Callable[[], _Reply]) -> _Reply:
        try:
            return read()
        except InvalidRequestError as error:
            raise DirectoryError(f"the directory at {self._address} answered {error.message}") from None
