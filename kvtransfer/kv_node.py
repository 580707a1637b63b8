"""A KV node as others see it: blocks held by key, looked at, verified and evicted. What workers and stores share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from core.blocks import BlockKey, BlockRecord, KvLayout, KvSource
from core.errors import LayoutMismatchError, StaleEpochError
from core.inventory import Inventory
from core.request import AttemptKey, WorkerRole
from kvtransfer.directory import Tier
from kvtransfer.exports import Exports
from kvtransfer.holds import granted_s


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


@dataclass(frozen=True, slots=True)
class NodeStat:
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
        dram = TierStat(
            Tier.DRAM, blocks, counts.total, blocks * self.layout.block_bytes, self.counts.hits, self.counts.misses, 0, 0
        )
        leases = self.inventory.leases_open()
        return NodeStat(
            source.worker_id, self.epoch, self.role, self.layout, (dram,), leases, self.policy, self.counts.digest_failures
        )

    def check_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            raise StaleEpochError(f"{self.source().worker_id} is of epoch {self.epoch}, the call is for epoch {epoch}")

    def check_layout(self, layout: KvLayout) -> None:
        if (mismatch := self.layout.mismatch(layout)) is not None:
            raise LayoutMismatchError(f"blocks of {self.source().worker_id} do not fit: {mismatch}")
