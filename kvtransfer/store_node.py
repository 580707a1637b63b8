"""A store node: computes nothing, lends memory and disk. Blocks come in by offers and go out by holds, as at any node.

It begins without knowing what a block looks like: the layout is that of the first offer, or the one its disk holds from an
earlier life. The latter yields to the first offer, because a cluster may come back with another model; after that a node
whose blocks do not fit is refused by name.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from core.blocks import BlockKey, KvLayout, KvSource
from core.clock import Clock
from core.errors import ConfigError, StaleEpochError, UnavailableError
from core.hostspec import HostSpec
from core.request import AttemptKey, WorkerRole
from kvtransfer.copier import settled
from kvtransfer.directory import NodeRecord, Tier
from kvtransfer.holds import check_keys, granted_s
from kvtransfer.kv_node import Held, NodeEntry, NodeStat, Pinned, TierStat, Verified
from kvtransfer.store_layout import recall, remember
from kvtransfer.store_offers import Offer, Offered, Offers, check_offer
from kvtransfer.store_plane import StorePlane, disk_directory, open_plane

log = logging.getLogger(__name__)

MEMORY_RETRY_S = 10.0  # memory that could not be had is asked for again after so long
PIN_PROMOTE_S = 5.0  # for bringing up what is to be pinned
PROMOTE_SHARE = 0.5  # of `store.fetch_timeout_s`: the rest is for asking and pulling


class StoreNode:
    """One per process. All methods on its event loop. `run` beside everything else, `close` at the end."""

    def __init__(self, spec: HostSpec, clock: Clock, host_id: str, grpc_address: Callable[[], str]) -> None:
        self.plane: StorePlane | None = None
        self.accepting = True
        """False while draining: what is here can still be read."""
        self.changed = asyncio.Event()
        """Set when the directory should hear of something."""
        self.on_plane: Callable[[StorePlane | None], None] = lambda plane: None
        self.on_held: Callable[[AttemptKey, Sequence[BlockKey]], None] = lambda holder, keys: None
        self.on_taken: Callable[[AttemptKey, Sequence[BlockKey]], None] = lambda holder, keys: None
        """Hear of what readers found, and of what an offer brought."""
        self.offers = Offers(spec.config.transfer.pull_timeout_s, self._accepted)
        self.disk_hits = 0
        self.disk_misses = 0
        self._spec = spec
        self._clock = clock
        self._host_id = host_id
        self._grpc_address = grpc_address
        self._opening = asyncio.Lock()
        self._confirmed = False  # somebody of this life has blocks of this layout
        self._no_memory = ("", 0.0)  # why, and until when it is not tried again
        self._writing: asyncio.Task[None] | None = None

    @property
    def epoch(self) -> int:
        return self._spec.epoch

    @property
    def layout(self) -> KvLayout | None:
        return self.plane.layout if self.plane is not None else None

    async def start(self) -> None:
        """Takes up what an earlier life left on disk, when it left anything."""
        if not self._spec.config.store.disk_dir:
            return
        layout = await asyncio.to_thread(recall, disk_directory(self._spec))
        if layout is not None:
            await self._open(layout)

    async def close(self) -> None:
        await self._close_plane()

    def tick(self) -> None:
        """Called a few times per second: ends the leases of those who never came back."""
        if self.plane is not None:
            self.plane.exports.expire(self._clock.now())
            self.plane.node.sweep()

    def record(self) -> NodeRecord:
        return NodeRecord(self._source(), self.layout, WorkerRole.STORE)

    # -- the service -----------------------------------------------------------------------------------------------

    async def offer(self, offer: Offer) -> Offered:
        """Pulls what is not here yet. Raises as `check_offer` and `Offers.take` do, StaleEpochError, LayoutMismatchError when
        blocks of another layout are here, UnavailableError when there is no memory, or the node drains."""
        self._check_epoch(offer.epoch)
        check_offer(offer)
        if not self.accepting:
            raise UnavailableError(f"{self._spec.worker_id} is draining: it takes no new blocks")
        return await self.offers.take(await self._plane_for(offer.layout), offer)

    async def hold(self, holder: AttemptKey, epoch: int, layout: KvLayout, keys: Sequence[BlockKey], lease_s: float) -> Held:
        """As `KvNode.hold`; blocks that memory lacks are first brought up from disk, as far as the time allows."""
        self._check_epoch(epoch)
        check_keys(keys)
        if (plane := self.plane) is None:
            return Held([], self._source(), granted_s(lease_s))
        plane.node.check_layout(layout)
        inventory = plane.inventory
        found = inventory.look(keys)
        kept = [block for block in found if block is not None]  # bringing up the others must not push these out
        up: list[int] = []
        try:
            missing = [key for key, block in zip(keys, found, strict=True) if block is None]
            if missing:
                up = await plane.disk.promote(missing, self._spec.config.store.fetch_timeout_s * PROMOTE_SHARE)
            held = await plane.node.hold(holder, epoch, layout, keys, lease_s)
        finally:
            inventory.release(kept + up)
        self._confirmed = self._confirmed or bool(held.records)
        self.disk_hits += len(up)
        self.disk_misses += len(missing) - len(up)
        plane.node.counts.hits -= len(up)  # memory did not have them
        plane.node.counts.misses += len(up)
        self.on_held(holder, [record.key for record in held.records])
        if up:
            self.changed.set()
        return Held(held.records, held.source, held.lease_s, len(up))

    def drop(self, holder: AttemptKey, epoch: int) -> bool:
        self._check_epoch(epoch)
        return self.plane is not None and self.plane.node.drop(holder, epoch)

    def stat(self) -> NodeStat:
        plane = self.plane
        if plane is None:
            policy = self._spec.config.store.policy
            return NodeStat(self._spec.worker_id, self.epoch, WorkerRole.STORE, None, (), 0, policy, 0)
        stat, tier = plane.node.stat(), plane.disk.tier
        if tier is None:
            return stat
        size, evicted = plane.layout.block_bytes, tier.stats.dropped_blocks + tier.stats.evicted_blocks
        blocks = len(tier.keys())
        most = int(self._spec.config.store.disk_bytes) // size
        disk = TierStat(Tier.DISK, blocks, most, tier.disk_bytes, self.disk_hits, self.disk_misses, evicted, 0)
        failures = stat.digest_failures + tier.stats.corrupt_blocks
        return stat._replace(tiers=(*stat.tiers, disk), digest_failures=failures)

    def entries(self) -> list[NodeEntry]:
        """Memory first."""
        plane = self.plane
        if plane is None:
            return []
        return plane.node.entries() + plane.disk.entries()

    async def verify(self, keys: Sequence[BlockKey]) -> Verified:
        """Digests of all blocks in memory and on disk, or of `keys` in memory; what fails is dropped."""
        plane = self.plane
        if plane is None:
            return Verified(0, 0)
        checked, dropped = await plane.node.verify(keys)
        if not keys and plane.disk.tier is not None:
            report = await plane.disk.tier.verify()
            checked, dropped = checked + report.checked, dropped + report.dropped
        self.changed.set()
        return Verified(checked, dropped)

    async def evict(self, keys: Sequence[BlockKey] | None) -> int:
        """Drops blocks from every tier, all of them for None; those held or pinned stay in all. Each tier's blocks count.

        A block that stays in memory without its copy on disk would be lost with the process: nobody writes it a second time.
        """
        plane = self.plane
        if plane is None:
            return 0
        gone = await plane.node.evict(keys)
        if (tier := plane.disk.tier) is not None:
            stays = {entry.key for entry in plane.inventory.entries()}
            for key in dict.fromkeys(tier.keys() if keys is None else keys):
                if key not in stays:
                    gone += await tier.evict(key)
        self.changed.set()
        return gone

    async def pin(self, keys: Sequence[BlockKey]) -> Pinned:
        """As `KvNode.pin`; what is on disk alone is brought up first, so that it is kept in memory."""
        plane = self.plane
        if plane is None:
            return Pinned(0, 0, 0)
        found = plane.inventory.look(keys)
        kept = [block for block in found if block is not None]
        try:
            missing = [key for key, block in zip(keys, found, strict=True) if block is None]
            kept += await plane.disk.promote(missing, PIN_PROMOTE_S)
            return await plane.node.pin(keys)
        finally:
            plane.inventory.release(kept)
            self.changed.set()

    def unpin(self, keys: Sequence[BlockKey] | None) -> Pinned:
        return self.plane.node.unpin(keys) if self.plane is not None else Pinned(0, 0, 0)

    # -- below: the plane that comes with the layout ---------------------------------------------------------------

    async def _plane_for(self, layout: KvLayout) -> StorePlane:
        async with self._opening:
            if self.plane is not None and self.plane.layout != layout and not self._confirmed:
                log.info("what the disk holds is of another layout than what is offered now; it is left alone")
                await self._close_plane()
            if self.plane is None:
                opening = asyncio.ensure_future(self._open(layout))
                await settled(opening)  # cancelled or not: half opened memory stands in the way of the next
                opening.result()
            if self.plane is None:
                raise UnavailableError(self._no_memory[0])
            self.plane.node.check_layout(layout)
            self._confirmed = True
            return self.plane

    async def _open(self, layout: KvLayout) -> None:
        why, until = self._no_memory
        if why and self._clock.now() < until:
            return
        try:
            plane = await open_plane(self._spec, layout, self._clock, self._host_id, self._grpc_address)
        except ConfigError as error:
            if str(error) != why:
                log.warning("no memory for blocks: %s", error)
            self._no_memory = (str(error), self._clock.now() + MEMORY_RETRY_S)
            return
        self._no_memory = ("", 0.0)
        self.plane = plane
        if plane.disk.tier is not None:
            await asyncio.to_thread(remember, disk_directory(self._spec), layout)
        self._writing = asyncio.create_task(plane.disk.run(), name="store-write-behind")
        self.on_plane(plane)
        self.changed.set()

    async def _close_plane(self) -> None:
        plane, self.plane = self.plane, None
        if plane is None:
            return
        self.on_plane(None)
        if self._writing is not None:
            self._writing.cancel()
            await asyncio.wait([self._writing])
        await plane.close()

    def _accepted(self, holder: AttemptKey, keys: Sequence[BlockKey]) -> None:
        if self.plane is not None:
            self.plane.disk.accepted(keys)
        self.on_taken(holder, keys)
        self.changed.set()

    def _source(self) -> KvSource:
        if self.plane is not None:
            return self.plane.node.source()
        return KvSource(self._spec.worker_id, self.epoch, self._grpc_address(), self._host_id)

    def _check_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            raise StaleEpochError(f"{self._spec.worker_id} is of epoch {self.epoch}, the call is for epoch {epoch}")
