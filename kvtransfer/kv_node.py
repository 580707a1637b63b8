"""A KV node as others see it: blocks held by key, looked at, verified and evicted. What workers and stores share."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from core.blocks import BlockKey, BlockRecord, KvLayout, KvSource
from core.errors import LayoutMismatchError, PinLimitError, StaleEpochError
from core.inventory import Inventory
from core.request import AttemptKey, WorkerRole
from kvtransfer.codec import digests_of
from kvtransfer.directory import Tier
from kvtransfer.exports import Exports
from kvtransfer.holds import granted_s

log = logging.getLogger(__name__)

VERIFY_BYTES = 8 * 2**20  # read by a thread at a time


@dataclass(frozen=True, slots=True)
class Held:
    """The answer to a hold: what is here, where to pull it from, and for how long."""

    records: list[BlockRecord]
    source: KvSource
    lease_s: float
    promoted: int = 0
    """Of the records, brought up from disk for this call."""


class TierStat(NamedTuple):
    tier: Tier
    blocks: int
    blocks_max: int
    bytes: int
    hits: int
    misses: int
    evictions: int
    pinned: int
    pinned_max: int = 0


class NodeEntry(NamedTuple):
    """A block as tools list it."""

    key: BlockKey
    tier: Tier
    block_bytes: int
    hits: int = 0
    tenant: bytes = b""
    pinned: bool = False
    digest: int = 0
    cost_s: float = 0.0
    age_s: float = 0.0
    idle_s: float | None = None
    """None where nobody knows."""


class Verified(NamedTuple):
    checked: int
    dropped: int


class Pinned(NamedTuple):
    """The answer to a pin: of the keys that were named, and here in all."""

    pinned: int
    pinned_blocks: int
    pinned_max: int


class NodeStat(NamedTuple):
    worker_id: str
    epoch: int
    role: WorkerRole
    layout: KvLayout | None
    """None while a store has not seen a block."""
    tiers: tuple[TierStat, ...]
    leases_open: int
    policy: str
    digest_failures: int


@dataclass(slots=True)
class NodeCounts:
    """Plain numbers, read when metrics are scraped."""

    hits: int = 0
    misses: int = 0
    digest_failures: int = 0


class KvNode:
    """The blocks of one arena. All methods on the event loop of the process."""

    def __init__(
        self,
        exports: Exports,
        inventory: Inventory,
        layout: KvLayout,
        source: Callable[[], KvSource],
        role: WorkerRole,
        policy: str = "lru",
    ) -> None:
        """`source` says where this node is once its servers listen."""
        self.exports = exports
        self.inventory = inventory
        self.layout = layout
        self.source = source
        self.role = role
        self.policy = policy
        self.counts = NodeCounts()
        self._condemned: set[BlockKey] = set()  # not what their digests say, still held by somebody

    @property
    def epoch(self) -> int:
        return self.exports.epoch

    async def hold(self, holder: AttemptKey, epoch: int, layout: KvLayout, keys: Sequence[BlockKey], lease_s: float) -> Held:
        """Raises StaleEpochError, LayoutMismatchError, and as `Exports.hold` does."""
        self.check_epoch(epoch)
        self.check_layout(layout)
        records = await self.exports.hold(holder, keys, lease_s)
        self.counts.hits += len(records)
        self.counts.misses += len(keys) - len(records)
        return Held(records, self.source(), granted_s(lease_s))

    def drop(self, holder: AttemptKey, epoch: int) -> bool:
        """Idempotent. Raises StaleEpochError: the incarnation that held is gone, and its leases with it."""
        self.check_epoch(epoch)
        return self.exports.drop(holder)

    def stat(self) -> NodeStat:
        counts, source = self.inventory.counts(), self.source()
        blocks = counts.total - counts.free
        evictions, pinned = self.inventory.evictions, self.inventory.pinned()
        dram = TierStat(
            Tier.DRAM,
            blocks,
            counts.total,
            blocks * self.layout.block_bytes,
            self.counts.hits,
            self.counts.misses,
            evictions.for_space + evictions.asked,
            pinned,
            self.inventory.pinned_max,
        )
        leases = self.inventory.leases_open()
        return NodeStat(
            source.worker_id, self.epoch, self.role, self.layout, (dram,), leases, self.policy, self.counts.digest_failures
        )

    def entries(self) -> list[NodeEntry]:
        size = self.layout.block_bytes
        return [
            NodeEntry(e.key, Tier.DRAM, size, e.hits, e.tenant, e.pinned, e.digest, e.cost_s, e.age_s, e.idle_s)
            for e in self.inventory.entries()
        ]

    async def verify(self, keys: Sequence[BlockKey]) -> Verified:
        """Reads `keys`, or every block, against the digests noted here; blocks without one cannot be judged. What fails is
        dropped and counted, or, while somebody holds it, when it is let go."""
        keys = keys or [entry.key for entry in self.inventory.entries()]
        span = max(1, VERIFY_BYTES // self.layout.block_bytes)
        checked, bad = 0, list[BlockKey]()
        for start in range(0, len(keys), span):
            part = keys[start : start + span]
            found = self.inventory.look(part)
            blocks = {block: key for key, block in zip(part, found, strict=True) if block is not None}
            try:
                known = [block for block in blocks if self.inventory.digest(block)]
                digests = await asyncio.to_thread(digests_of, self.exports.arena.bytes_view(), known)
                checked += len(known)
                bad += [blocks[b] for b, digest in zip(known, digests, strict=True) if digest != self.inventory.digest(b)]
            finally:
                self.inventory.release([block for block in found if block is not None])
        self.condemn(bad)
        return Verified(checked, len(bad))

    def condemn(self, keys: Sequence[BlockKey]) -> None:
        """Blocks that are not what their digests say: dropped now, or when they are let go."""
        if keys:
            log.warning("%d blocks in memory are not what their digests say; they are dropped", len(keys))
        self.counts.digest_failures += len(keys)
        self.inventory.unpin(keys)
        self._condemned.update(keys)
        self.sweep()

    def sweep(self) -> None:
        """To be called a few times per second: drops blocks that failed their digest and are held by nobody any more."""
        if self._condemned:
            self.inventory.evict(self._condemned)
            found = self.inventory.look(list(self._condemned))
            left = {key for key, block in zip(self._condemned, found, strict=True) if block is not None}
            self.inventory.release([block for block in found if block is not None])
            self._condemned = left

    async def evict(self, keys: Sequence[BlockKey] | None) -> int:
        """Drops blocks that nobody holds and nobody pinned, all of them for None. How many went."""
        return self.inventory.evict([entry.key for entry in self.inventory.entries()] if keys is None else keys)

    async def pin(self, keys: Sequence[BlockKey]) -> Pinned:
        """Keeps what is here of `keys` until it is unpinned, or this process ends. Raises PinLimitError: nothing is then."""
        try:
            return self._pinned(self.inventory.pin([key for key in keys if key not in self._condemned]))
        except PinLimitError as error:
            raise PinLimitError(f"{self.source().worker_id}: {error.message}") from None

    def unpin(self, keys: Sequence[BlockKey] | None) -> Pinned:
        """Lets go of `keys`, of all that is pinned for None."""
        return self._pinned(self.inventory.unpin(self.inventory.pinned_keys() if keys is None else keys))

    def _pinned(self, count: int) -> Pinned:
        return Pinned(count, self.inventory.pinned(), self.inventory.pinned_max)

    def check_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            raise StaleEpochError(f"{self.source().worker_id} is of epoch {self.epoch}, the call is for epoch {epoch}")

    def check_layout(self, layout: KvLayout) -> None:
        if (mismatch := self.layout.mismatch(layout)) is not None:
            raise LayoutMismatchError(f"blocks of {self.source().worker_id} do not fit: {mismatch}")
