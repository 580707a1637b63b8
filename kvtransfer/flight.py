"""One act of bringing missing blocks here: located, planned, held at their nodes, fetched, committed, let go."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from core.blocks import BlockKey, BlockRecord
from core.clock import Clock
from core.errors import DigestMismatchError, OutOfBlocksError, TransferError
from core.inventory import Inventory
from core.request import WorkerRole
from core.telemetry import TRANSFER_SECONDS, Histogram
from kvtransfer.directory import NOWHERE, Directory, DirectoryError, Holder, Located, NodeRecord, Tier
from kvtransfer.fetch import Fetcher
from kvtransfer.hold_client import Hold, HoldClient
from kvtransfer.holds import HOLD_KEYS_MAX
from kvtransfer.link_costs import ASSUMED, LinkCosts
from kvtransfer.residency import Here, LinkCost, Prices, Share, plan

log = logging.getLogger(__name__)

T = TypeVar("T")

SLICE_BYTES = 16 * 2**20  # fetched and committed at a time: what is here stays here when the rest fails
ROOM_LEFT = 16  # one block of so many is not taken for fetches: streams in progress need room to grow


@dataclass(slots=True)
class ResidentStats:
    """Plain numbers, read when metrics are scraped. Sources are local, peer and store; tiers dram and disk."""

    prompts: int = 0
    """Prompts that were looked for."""
    asked: int = 0
    """Of these, with the directory's help."""
    blocks: Counter[tuple[str, str]] = field(default_factory=Counter)  # found, by (source, tier)
    bytes: Counter[tuple[str, str]] = field(default_factory=Counter)  # moved
    misses: int = 0
    """Blocks that had to be computed."""
    failures: Counter[str] = field(default_factory=Counter)  # of sources, by error code
    directory_failures: int = 0
    timeouts: int = 0
    short_of_memory: int = 0
    seconds: Histogram = field(default_factory=lambda: Histogram(TRANSFER_SECONDS))
    """How long prompts waited for blocks from elsewhere, successful or not."""


@dataclass(frozen=True, slots=True)
class Ground:
    """What flights of one process share."""

    here: Here
    inventory: Inventory
    directory: Directory
    fetcher: Fetcher
    holds: HoldClient
    clock: Clock
    compute_block_s: Callable[[], float]
    """What computing one block takes here; `inf`: fetch whatever can be had."""
    from_store: Callable[[Sequence[BlockKey]], None] = lambda keys: None
    """Hears of blocks that came from a store."""
    costs: LinkCosts = field(default_factory=LinkCosts)
    stats: ResidentStats = field(default_factory=ResidentStats)


class Flight:
    """Brings what it can of `keys` until `until`; every failure is a shorter prefix. Nobody else fetches them meanwhile.

    `pending` are the keys that may still come. All references are given back at the end: the blocks stay as cache.
    """

    def __init__(self, ground: Ground, keys: Sequence[BlockKey], tenant: bytes, until: float) -> None:
        self.keys = keys
        self.pending = set(keys)
        self.waiters = 0
        self._ground = ground
        self._tenant = tenant
        self._until = until
        self._located: Located = NOWHERE
        self._holders: list[tuple[Holder, ...]] = []  # by place; who disappointed is struck out
        self._blocks: dict[int, int] = {}  # by place, a reference on each
        self._changed = asyncio.Event()
        self.task = asyncio.create_task(self._run(), name=f"kv-flight {len(keys)} blocks")
        self.task.add_done_callback(self._ended)

    async def landed(self, keys: Collection[BlockKey]) -> None:
        """Returns when none of `keys` is pending. The caller sets the deadline."""
        while not self.pending.isdisjoint(keys):
            await self._changed.wait()

    async def _run(self) -> None:
        ground = self._ground
        try:
            async with asyncio.timeout(self._until - ground.clock.now()):
                await self._bring()
        except TimeoutError:
            log.info("%d of %d blocks did not come in time", len(self.pending), len(self.keys))
        except DirectoryError as error:
            ground.stats.directory_failures += 1
            log.debug("nobody could be asked for %d blocks: %s", len(self.keys), error.message)
        finally:
            ground.inventory.release([self._blocks[place] for place in sorted(self._blocks)])

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.pending.clear()
        self._tell()
        if not task.cancelled() and (mistake := task.exception()) is not None:
            log.error("fetching blocks failed", exc_info=mistake)

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _bring(self) -> None:
        self._located = await self._ground.directory.locate(self.keys)
        self._holders = list(self._located.holders)
        while True:
            left = [place for place in range(len(self._holders)) if self.keys[place] in self.pending]
            shares = self._plan(left)
            if not self._make_room(sorted(place for share in shares for place in share.places)):
                return
            async with asyncio.TaskGroup() as group:
                for holder, places in shares:
                    kept = [place for place in places if place in self._blocks]
                    if kept:
                        group.create_task(self._take(holder, kept), name=f"kv-take {holder.worker_id}")

    def _plan(self, left: Sequence[int]) -> list[Share]:
        """Shares of what is still missing, in places of `self.keys`."""
        ground, now = self._ground, self._ground.clock.now()

        def price(holder: Holder, near: bool) -> LinkCost:
            return ground.costs.cost(holder, near, now)

        prices = Prices(price, ground.compute_block_s(), self._until - now)
        located = Located(self._located.nodes, [self._holders[place] for place in left])
        shares = plan([self.keys[place] for place in left], located, ground.here, prices)
        return [Share(share.holder, tuple(left[place] for place in share.places)) for share in shares]

    def _make_room(self, places: Sequence[int]) -> bool:
        """A block for each of the first of `places` that memory can be had for; False when there is nothing to fill."""
        inventory = self._ground.inventory
        needed = [place for place in places if place not in self._blocks]
        counts = inventory.counts()
        room = max(0, counts.free + counts.cached - counts.total // ROOM_LEFT)
        try:
            fresh = inventory.allocate(min(room, len(needed)))
        except OutOfBlocksError:  # somebody was quicker
            fresh = []
        if len(fresh) < len(needed):
            self._ground.stats.short_of_memory += 1
        self._blocks.update(zip(needed, fresh, strict=False))
        return any(place in self._blocks for place in places)

    async def _take(self, holder: Holder, places: Sequence[int]) -> None:
        """What one node has of `places`. Whatever does not come is not asked of it again."""
        ground, record = self._ground, self._located.nodes[holder.worker_id]
        try:
            ground.fetcher.meet(record.source)
            for part in _parts(places, HOLD_KEYS_MAX):
                await self._take_part(holder, record, part)
        except TransferError as error:
            ground.stats.failures[error.code] += 1
            log.info("%s gave less than it was said to have: %s", holder.worker_id, error.message)
        for place in places:
            if self.keys[place] in self.pending:
                self._holders[place] = tuple(h for h in self._holders[place] if h.worker_id != holder.worker_id)

    async def _take_part(self, holder: Holder, record: NodeRecord, places: Sequence[int]) -> None:
        ground, clock = self._ground, self._ground.clock
        started, num_bytes = clock.now(), 0
        left_s = max(0.001, self._until - started)
        wanted = [self.keys[place] for place in places]
        async with ground.holds.hold(record.source, wanted, timeout_s=left_s, lease_s=2 * left_s) as hold:
            held = clock.now()
            slice_blocks = max(1, SLICE_BYTES // ground.here.layout.block_bytes)
            for records in _parts(hold.records, slice_blocks):
                num_bytes += await self._fetch(holder, record, hold, records, places)
        near, now = record.source.host_id == ground.here.host_id, clock.now()
        if holder.tier is Tier.DISK:  # reading from disk is part of the hold, and grows with the blocks
            ground.costs.observe(holder, near, now, ASSUMED[near, Tier.DISK].latency_s, num_bytes, now - started)
        else:
            ground.costs.observe(holder, near, now, held - started, num_bytes, now - held)

    async def _fetch(
        self, holder: Holder, record: NodeRecord, hold: Hold, records: Sequence[BlockRecord], places: Sequence[int]
    ) -> int:
        """Bytes that came and were committed. Blocks with a wrong digest are not: they cost their slice, nothing more."""
        ground = self._ground
        dest_blocks = [self._blocks[places[r.index]] for r in records]
        try:
            result = await ground.fetcher.fetch(hold.source, hold.holder, records, dest_blocks)
        except DigestMismatchError as error:
            ground.stats.failures[error.code] += 1
            log.warning("blocks of %s are not used: %s", holder.worker_id, error.message)
            ground.holds.complain(record.source, [r.key for r in records])
            return 0
        for r, block in zip(records, dest_blocks, strict=True):
            self._blocks[places[r.index]] = ground.inventory.commit(block, r.key, r.digest, tenant=self._tenant)
            self.pending.discard(r.key)
        stored = record.role is WorkerRole.STORE
        if stored:
            ground.from_store([r.key for r in records])
        source = "store" if stored else "peer", holder.tier.name.lower()
        ground.stats.blocks[source] += len(records)
        ground.stats.bytes[source] += result.bytes
        self._tell()
        return result.bytes


def _parts(things: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for first in range(0, len(things), size):
        yield things[first : first + size]
