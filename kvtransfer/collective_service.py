"""The source's side of the collective transport: meets a puller in a group, and sends what it may read into it."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import grpc
import numpy as np

from core.errors import InvalidRequestError, LayoutMismatchError, StaleEpochError, TransferError
from core.wire import key_from_pb
from kvtransfer.collective_helper import Helper
from kvtransfer.collective_orders import Meet, Send, Span
from kvtransfer.collective_pieces import check_pieces
from kvtransfer.copier import settled
from kvtransfer.exports import Exports
from kvtransfer.rpc import abort
from kvtransfer.shared_arena import SharedArena
from kvtransfer.transport import BlocksGoneError
from tandem.errors import TandemError
from tandem.v1 import kv_pb2, kv_pb2_grpc

log = logging.getLogger(__name__)

COLLECT_BLOCKS_MAX = 4096  # of one request; a puller that wants more asks again
GROUP_NAME_MAX = 64
_TIMEOUT_S_MAX = 300.0
_Context = grpc.aio.ServicerContext[Any, Any]


class CollectiveServicer(kv_pb2_grpc.KvCollectiveServicer):
    """Registered as `tandem.v1.KvCollective`. The helper reads the same arena that `exports` announces blocks of."""

    def __init__(self, exports: Exports, helper: Helper) -> None:
        self._exports = exports
        self._helper = helper

    async def Meet(self, request: kv_pb2.MeetRequest, context: _Context) -> kv_pb2.MeetReply:
        try:
            timeout_s = _remaining_s(context)
            if request.epoch != self._exports.epoch:
                raise StaleEpochError(f"this worker is of epoch {self._exports.epoch}, the call is for epoch {request.epoch}")
            if not request.group or len(request.group) > GROUP_NAME_MAX:
                raise InvalidRequestError(f"a group has a name of 1 to {GROUP_NAME_MAX} characters")
            backend = await self._helper.backend()
            if backend != request.backend:
                raise TransferError(f"groups are of {backend} here, of {request.backend} there; set transfer.collective alike")
            made = await self._helper.make(Meet(request.group, timeout_s))
        except TandemError as error:
            await abort(context, error)
        host = self._helper.host
        return kv_pb2.MeetReply(store=f"[{host}]:{made['port']}" if ":" in host else f"{host}:{made['port']}")

    async def Collect(self, request: kv_pb2.CollectRequest, context: _Context) -> kv_pb2.CollectReply:
        """A puller that gives up, or is gone, cancels us: like after every failure the group is out of step then."""
        try:
            self._check(request)
            if not self._helper.knows(request.group):
                return kv_pb2.CollectReply(known=False)
            sent = await self._helper.move(self._order(request, _remaining_s(context)))
        except BaseException as error:
            await settled(asyncio.ensure_future(self._helper.drop(request.group)))
            if not isinstance(error, TandemError):
                raise
            await abort(context, error)
        return kv_pb2.CollectReply(known=True, gone=sent["gone"])

    def _check(self, request: kv_pb2.CollectRequest) -> None:
        """Raises what the puller is to hear before anything is sent."""
        arena, size, count = self._exports.arena, self._exports.arena.block_bytes, len(request.block_ids)
        if request.block_bytes != size:
            raise LayoutMismatchError(f"block_bytes differs: {size} here, {request.block_bytes} there")
        if count > COLLECT_BLOCKS_MAX:
            raise InvalidRequestError(f"{count} blocks in one Collect; ask for at most {COLLECT_BLOCKS_MAX}")
        if len(request.generations) != count:
            raise InvalidRequestError(f"{count} blocks with {len(request.generations)} generations")
        if (wrong := check_pieces(request.piece_blocks, count, size)) is not None:
            raise InvalidRequestError(wrong)
        places = list(zip(request.block_ids, request.generations, strict=True))
        self._exports.check_readable(key_from_pb(request.key), request.epoch, places)
        ids = np.fromiter(request.block_ids, np.intp, count)
        changed = np.flatnonzero(arena.generations[ids] != np.fromiter(request.generations, np.uint64, count))
        if changed.size:
            raise BlocksGoneError(changed.tolist())

    def _order(self, request: kv_pb2.CollectRequest, timeout_s: float) -> Send:
        arena = self._exports.arena
        assert isinstance(arena, SharedArena), "another process could not read it"
        span = Span(arena.path, arena.epoch, list(request.block_ids), list(request.piece_blocks))
        return Send(request.group, request.seq, span, list(request.generations), timeout_s)


def _remaining_s(context: _Context) -> float:
    remaining_s = context.time_remaining()
    if remaining_s is None:
        raise InvalidRequestError("this call needs a deadline; set one on the call")
    return max(0.0, min(float(remaining_s), _TIMEOUT_S_MAX))
