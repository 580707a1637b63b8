"""Asking other nodes to hold blocks while they are pulled, and letting go of them afterwards."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import NamedTuple

import grpc

from core.blocks import BlockKey, BlockRecord, KvLayout, KvSource
from core.errors import InvalidRequestError, TransferError
from core.request import AttemptKey
from core.wire import key_to_pb, layout_to_pb, record_from_pb, source_from_pb
from kvtransfer.channels import Channels
from kvtransfer.complaint import complain
from kvtransfer.rpc import transfer_error
from tandem.cancelling import heed_cancellation
from tandem.v1 import kv_pb2

log = logging.getLogger(__name__)

DROP_TIMEOUT_S = 1.0


class Hold(NamedTuple):
    """What another node holds for us. `records` are those of our keys that it has, `index` their places among them."""

    holder: AttemptKey
    source: KvSource
    records: list[BlockRecord]


class HoldClient:
    """One per process. Holders are named `hold/WORKER/EPOCH.N`, so that no two holds of any incarnation share a name."""

    def __init__(self, channels: Channels, layout: KvLayout, worker_id: str, epoch: int) -> None:
        self._channels = channels
        self._layout = layout
        self._prefix = f"hold/{worker_id}/{epoch}."
        self._count = 0
        self._dropping: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def hold(self, source: KvSource, keys: Sequence[BlockKey], timeout_s: float, lease_s: float) -> AsyncIterator[Hold]:
        """What of `keys` is at `source`, leased until the end of the block.

        Raises TransferError or a child. However the block ends, also when the answer never came, the node is told to drop
        the lease; nobody waits for that.
        """
        self._count += 1
        holder = AttemptKey(f"{self._prefix}{self._count}", 1)
        request = kv_pb2.HoldRequest(
            holder=key_to_pb(holder), epoch=source.epoch, layout=layout_to_pb(self._layout), keys=keys, lease_s=lease_s
        )
        try:
            yield self._understood(await self._ask(source, request, timeout_s), holder, source, keys)
        finally:
            self._begin(self._drop(source, holder), f"kv-drop {holder.request_id}")

    def complain(self, source: KvSource, keys: Sequence[BlockKey]) -> None:
        """Blocks of these came with a wrong digest. Nobody waits for what the node does about it."""
        self._begin(complain(self._channels, source, keys), f"kv-complain {source.worker_id}")

    async def close(self) -> None:
        """Waits for the farewells still on their way."""
        if self._dropping:
            await asyncio.wait(self._dropping)

    async def _ask(self, source: KvSource, request: kv_pb2.HoldRequest, timeout_s: float) -> kv_pb2.HoldReply:
        try:
            reply: kv_pb2.HoldReply = await self._channels.stub(source).Hold(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            heed_cancellation()
            raise transfer_error(error, source.worker_id) from None
        except asyncio.CancelledError:
            heed_cancellation()  # nobody cancelled us: the channel was closed under the call
            raise TransferError(f"the connection to {source.worker_id} was closed") from None
        return reply

    def _understood(self, reply: kv_pb2.HoldReply, holder: AttemptKey, asked: KvSource, keys: Sequence[BlockKey]) -> Hold:
        """The reply as values of ours. Raises TransferError for one that does not answer what was asked."""
        try:
            records = [record_from_pb(record) for record in reply.records]
            source = source_from_pb(reply.source)
        except InvalidRequestError as error:
            raise TransferError(f"{asked.worker_id} holds a block that cannot be: {error.message}") from None
        if (source.worker_id, source.epoch) != (asked.worker_id, asked.epoch):
            raise TransferError(f"{asked.worker_id} answered a hold for {source.worker_id}, epoch {source.epoch}")
        places = [record.index for record in records]
        if len(set(places)) != len(places) or any(place >= len(keys) for place in places):
            raise TransferError(f"{asked.worker_id} holds blocks that nobody asked for")
        if any(r.key != keys[r.index] or r.num_tokens != self._layout.block_size for r in records):
            raise TransferError(f"{asked.worker_id} holds other blocks than those that were asked for")
        return Hold(holder, source, records)

    def _begin(self, work: Coroutine[object, object, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._dropping.add(task)
        task.add_done_callback(self._dropping.discard)

    async def _drop(self, source: KvSource, holder: AttemptKey) -> None:
        request = kv_pb2.DropRequest(holder=key_to_pb(holder), epoch=source.epoch)
        try:
            await self._channels.stub(source).Drop(request, timeout=DROP_TIMEOUT_S)
        except (grpc.aio.AioRpcError, asyncio.CancelledError) as error:
            heed_cancellation()
            log.info(
                "%s may not have heard that %s is done; its lease runs out (%s)", source.worker_id, holder, type(error).__name__
            )
