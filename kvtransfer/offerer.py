"""Offers finished blocks to a store, which pulls what it lacks: that way they outlive this worker. A step never waits."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc

from core.blocks import BlockKey, BlockRecord, KvLayout, KvSource
from core.errors import LayoutMismatchError, TandemError, TransferError
from core.inventory import Inventory
from core.request import AttemptKey, WorkerRole
from core.wire import key_to_pb, layout_to_pb, record_to_pb, source_to_pb
from kvtransfer.channels import Channels
from kvtransfer.directory import NodeRecord
from kvtransfer.exports import Exports
from kvtransfer.gathering import gathered
from kvtransfer.rpc import transfer_error
from kvtransfer.store_choice import choose_store
from tandem.cancelling import heed_cancellation
from tandem.v1 import kv_pb2

log = logging.getLogger(__name__)

QUEUE_MAX = 16_384  # blocks; beyond it the oldest are forgotten
SKIPPED_MAX = 65_536
BATCH_BLOCKS = 256
BATCH_BYTES = 16 * 2**20
OFFER_TIMEOUT_S = 10.0
LEASE_MARGIN_S = 2.0
PAUSE_MIN_S = 0.2
PAUSE_MAX_S = 5.0
_OFFERED = object()


@dataclass(slots=True)
class OfferStats:
    """Blocks, but for `failures`: plain numbers, read when metrics are scraped."""

    taken: int = 0
    known: int = 0
    """Offered although the store had them."""
    refused: int = 0
    gone: int = 0
    """Evicted here before it was their turn."""
    forgotten: int = 0
    """Pushed out of the full queue."""
    failures: int = 0
    """Offers that did not reach a store."""


class Offerer:
    """One per worker; `run` until cancelled. Every other method returns at once.

    `source` says where this worker's blocks can be read, `cost_s` what computing one of them takes (0: not known).
    """

    def __init__(
        self,
        exports: Exports,
        inventory: Inventory,
        channels: Channels,
        layout: KvLayout,
        source: Callable[[], KvSource],
        cost_s: Callable[[], float],
    ) -> None:
        self.stats = OfferStats()
        self._exports = exports
        self._inventory = inventory
        self._channels = channels
        self._layout = layout
        self._source = source
        self._cost_s = cost_s
        self._store: KvSource | None = None
        self._queue: OrderedDict[BlockKey, None] = OrderedDict()  # oldest first
        self._skipped: OrderedDict[BlockKey, None] = OrderedDict()  # need no offer when they become resident here
        self._news = asyncio.Event()
        self._pause_s = PAUSE_MIN_S
        self._count = 0

    def __len__(self) -> int:
        """Blocks that wait to be offered."""
        return len(self._queue)

    def met(self, nodes: Sequence[NodeRecord]) -> bool:
        """Who is there. True when blocks go to another store from now on, which knows none of them yet."""
        before, here = self._store, self._source()
        self._store = choose_store([n.source for n in nodes if n.role is WorkerRole.STORE], here)
        if self._store == before or self._store is None:
            return False
        same_life = before is not None and (before.worker_id, before.epoch) == (self._store.worker_id, self._store.epoch)
        self._news.set()
        return not same_life

    def offer(self, keys: Sequence[BlockKey]) -> None:
        """Blocks that became resident here, whether or not the store had them once: it may have evicted them since.

        What was skipped is left out, this once; without a store, everything.
        """
        if self._store is None:
            return
        for key in keys:
            if self._skipped.pop(key, _OFFERED) is _OFFERED:
                self._queue[key] = None
        while len(self._queue) > QUEUE_MAX:
            self._queue.popitem(last=False)
            self.stats.forgotten += 1
        self._news.set()

    def skip(self, keys: Sequence[BlockKey]) -> None:
        """These will become resident here and need no offer: they come from the store, or from a worker that offers them."""
        for key in keys:
            self._skipped[key] = None
        while len(self._skipped) > SKIPPED_MAX:
            self._skipped.popitem(last=False)

    async def run(self) -> None:
        while True:
            while self._store is None or not self._queue:
                self._news.clear()
                await self._news.wait()
                await gathered(self._news)  # on top of what announcing took: one offer for a whole prompt
            batch = [key for key, _ in zip(self._queue, range(self._batch_blocks()), strict=False)]
            try:
                await self._offer(self._store, batch)
            except LayoutMismatchError as error:
                log.warning("blocks of this worker are not offered: %s", error.message)
                self.stats.refused += len(batch)
                self._forget(batch)
                await self._pause()
            except TandemError as error:
                self.stats.failures += 1
                log.debug("an offer of %d blocks failed: %s", len(batch), error.message)
                await self._pause()
            else:
                self._pause_s = PAUSE_MIN_S
                self._forget(batch)

    def _batch_blocks(self) -> int:
        """Leased while the store pulls them, so never much of the memory."""
        most = min(BATCH_BYTES // self._layout.block_bytes, self._inventory.counts().total // 8)
        return max(1, min(BATCH_BLOCKS, most))

    async def _offer(self, store: KvSource, keys: Sequence[BlockKey]) -> None:
        """Raises TransferError or a child when the store did not answer for them all."""
        self._count += 1
        holder = AttemptKey(f"offer/{self._source().worker_id}/{self._exports.epoch}.{self._count}", 1)
        records = await self._exports.hold(holder, keys, OFFER_TIMEOUT_S + LEASE_MARGIN_S)
        self.stats.gone += len(keys) - len(records)
        try:
            for tenant, theirs in self._by_tenant(records).items():
                await self._ask(store, holder, theirs, tenant)
        finally:
            self._exports.drop(holder)

    def _by_tenant(self, records: Sequence[BlockRecord]) -> dict[bytes, list[BlockRecord]]:
        tenants: dict[bytes, list[BlockRecord]] = {}
        for record in records:
            tenants.setdefault(self._inventory.tenant_of(record.block_id), []).append(record)
        return tenants

    async def _ask(self, store: KvSource, holder: AttemptKey, records: Sequence[BlockRecord], tenant: bytes) -> None:
        request = kv_pb2.OfferRequest(
            holder=key_to_pb(holder),
            epoch=store.epoch,
            layout=layout_to_pb(self._layout),
            source=source_to_pb(self._source()),
            records=[record_to_pb(record) for record in records],
            tenant=tenant,
            cost_s=self._cost_s(),
        )
        try:
            reply: kv_pb2.OfferReply = await self._channels.stub(store).Offer(request, timeout=OFFER_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            heed_cancellation()
            raise transfer_error(error, store.worker_id) from None
        except asyncio.CancelledError:
            heed_cancellation()  # nobody cancelled us: the channel was closed under the call
            raise TransferError(f"the connection to {store.worker_id} was closed") from None
        self.stats.taken += reply.taken
        self.stats.known += reply.known
        self.stats.refused += reply.refused

    def _forget(self, batch: Sequence[BlockKey]) -> None:
        for key in batch:
            self._queue.pop(key, None)

    async def _pause(self) -> None:
        await asyncio.sleep(self._pause_s)
        self._pause_s = min(2 * self._pause_s, PAUSE_MAX_S)
