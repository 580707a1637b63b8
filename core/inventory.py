"""A node's one table of blocks: who holds them, which are findable by key, which may be evicted.

Deciding code: no clock and no memory of KV here, only numbers. Engine, puller and exports of a worker share one
Inventory; every change is serialised by one lock and costs time in proportion to the blocks named, not to the table.

A block is in exactly one state:

    free ── allocate ──▶ active, uncommitted ── commit ──▶ active, committed ◀── match, retain, lease ── cached
     ▲                         │ last release                    │ last release                           ▲ │
     └─────────────────────────┘                                 └────────────────────────────────────────┘ │
     └── evicted, oldest first, when `allocate` finds nothing free ◀────────────────────────────────────────┘

A reference is anonymous: whoever took it releases it. A lease is a bag of references with a holder and an end.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, MutableSequence, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from threading import Lock
from typing import NamedTuple

from core.blocks import KEY_BYTES, BlockKey
from core.errors import OutOfBlocksError
from core.request import AttemptKey


class BlockCounts(NamedTuple):
    """Blocks by state; `free + cached + active == total`. Free and cached ones can be allocated."""

    total: int
    free: int
    cached: int
    active: int


@dataclass(slots=True, eq=False)
class _Lease:
    until: float
    blocks: list[int] = field(default_factory=list)
    ended: bool = False


class Inventory:
    """Allocation, references, keys, leases and eviction of `num_blocks` blocks.

    `generations` is where the generation words live, one per block; a shared-memory arena passes its own so that readers
    in other processes can check them before and after a copy. A word changes before a block's next owner can write to it
    and never while the block is held or cached, so a record (block, generation) names the same bytes as long as the word
    is unchanged. Misuse (releasing what is not held, committing twice under two keys) is an AssertionError.
    """

    def __init__(self, num_blocks: int, generations: MutableSequence[int] | None = None) -> None:
        assert num_blocks > 0, "an inventory needs at least one block"
        assert generations is None or len(generations) >= num_blocks, "one generation word per block"
        self._lock = Lock()
        self._total = num_blocks
        self._shared = generations
        # Ours is the truth; what others can map is only ever written.
        self._generation = [0] * num_blocks if generations is None else [int(generations[b]) for b in range(num_blocks)]
        self._refs = [0] * num_blocks
        self._key: list[BlockKey | None] = [None] * num_blocks
        self._digest = [0] * num_blocks
        self._by_key: dict[BlockKey, int] = {}
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._leases: dict[AttemptKey, _Lease] = {}
        self._ends: list[tuple[float, int, AttemptKey, _Lease]] = []  # heap; a renewed lease is put back when it comes up
        self._ends_pushed = 0

    def allocate(self, count: int) -> list[int]:
        """`count` blocks of undefined content, one reference each for the caller. All or nothing.

        Raises OutOfBlocksError when fewer are free or evictable.
        """
        with self._lock:
            if count > len(self._free) + len(self._cached):
                raise OutOfBlocksError(
                    f"{count} KV blocks are needed and {len(self._free) + len(self._cached)} of {self._total} can be had; "
                    "retry later, or raise engine.kv_bytes"
                )
            return [self._hand_out() for _ in range(count)]

    def commit(self, block: int, key: BlockKey, digest: int = 0) -> int:
        """Makes a held block findable under `key`; its content must be final. Returns the block to use from now on.

        When the key is already resident the caller's reference moves to that block and `block` loses it. Committing a
        block again under its own key changes nothing.
        """
        assert len(key) == KEY_BYTES, "only full blocks have keys"
        with self._lock:
            assert self._refs[block] > 0, f"block {block} is committed by nobody who holds it"
            assert self._key[block] in (None, key), f"block {block} is committed under another key"
            resident = self._by_key.get(key)
            if resident is not None and resident != block:
                self._take(resident)
                self._drop(block)
                return resident
            self._key[block] = key
            self._by_key[key] = block
            if digest:
                self._digest[block] = digest
            return block

    def match(self, keys: Sequence[BlockKey]) -> list[int]:
        """The blocks of the longest resident prefix of `keys`, a reference taken on each for the caller."""
        found: list[int] = []
        with self._lock:
            for key in keys:
                block = self._by_key.get(key)
                if block is None:
                    break
                self._take(block)
                found.append(block)
        return found

    def retain(self, blocks: Iterable[int]) -> None:
        """One more reference on each block; they must be held or cached."""
        with self._lock:
            for block in blocks:
                self._take(block)

    def release(self, blocks: Sequence[int]) -> None:
        """Drops one reference on each block. Unreferenced, a committed block stays as cache, another becomes free.

        Blocks given in the order of their sequence are evicted last first: a prefix is useful without its tail, never
        the other way round.
        """
        with self._lock:
            for block in reversed(blocks):
                self._drop(block)

    def lease(self, holder: AttemptKey, blocks: Iterable[int], until: float) -> None:
        """Takes one more reference on each block for `holder`. Leasing again adds blocks and never shortens the lease."""
        with self._lock:
            lease = self._leases.get(holder)
            if lease is None:
                lease = self._leases[holder] = _Lease(until)
                self._push(until, holder, lease)
            for block in blocks:
                self._take(block)
                lease.blocks.append(block)
            lease.until = max(lease.until, until)

    def renew(self, holder: AttemptKey, until: float) -> bool:
        """Lengthens a lease; False when the holder has none (any more)."""
        with self._lock:
            lease = self._leases.get(holder)
            if lease is None:
                return False
            lease.until = max(lease.until, until)
            return True

    def end(self, holder: AttemptKey) -> bool:
        """Ends a lease and drops its references. Idempotent; False when there was none."""
        with self._lock:
            return self._end(holder)

    def expire(self, now: float) -> list[AttemptKey]:
        """Ends every lease whose time is up (`until <= now`) and says whose."""
        expired: list[AttemptKey] = []
        with self._lock:
            while self._ends and self._ends[0][0] <= now:
                _, _, holder, lease = heappop(self._ends)
                if lease.ended:
                    continue
                if lease.until > now:
                    self._push(lease.until, holder, lease)
                    continue
                self._end(holder)
                expired.append(holder)
        return expired

    def generation(self, block: int) -> int:
        """Changes whenever the block is handed out again or freed."""
        with self._lock:
            return self._generation[block]

    def digest(self, block: int) -> int:
        """xxh3-64 of the block's bytes as last set, 0 when unknown."""
        with self._lock:
            return self._digest[block]

    def set_digest(self, block: int, digest: int, generation: int | None = None) -> bool:
        """Notes a block's digest. With `generation`, only if the block still is the one that was read; False otherwise."""
        with self._lock:
            if generation is not None and generation != self._generation[block]:
                return False
            self._digest[block] = digest
            return True

    def key_of(self, block: int) -> BlockKey | None:
        """The key a block is findable under, None while it is uncommitted."""
        with self._lock:
            return self._key[block]

    def counts(self) -> BlockCounts:
        with self._lock:
            free, cached = len(self._free), len(self._cached)
            return BlockCounts(self._total, free, cached, self._total - free - cached)

    def leases_open(self) -> int:
        with self._lock:
            return len(self._leases)

    def check(self) -> None:
        """Asserts every invariant of the table; time in proportion to its size, so for idle moments and tests."""
        with self._lock:
            self._check_states()
            self._check_keys()
            self._check_leases()

    # -- below: the caller holds the lock --------------------------------------------------------------------------

    def _hand_out(self) -> int:
        block = self._free.pop() if self._free else self._evict()
        self._renumber(block)  # before the new owner can write
        self._refs[block] = 1
        self._digest[block] = 0
        return block

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        key = self._key[block]
        assert key is not None
        del self._by_key[key]
        self._key[block] = None
        return block

    def _take(self, block: int) -> None:
        if self._refs[block] == 0:
            assert block in self._cached, f"block {block} is free: nobody can take a reference on it"
            del self._cached[block]
        self._refs[block] += 1

    def _drop(self, block: int) -> None:
        assert self._refs[block] > 0, f"block {block} is released by nobody who holds it"
        self._refs[block] -= 1
        if self._refs[block]:
            return
        if self._key[block] is not None:
            self._cached[block] = None
            return
        self._renumber(block)  # a late reader of freed bytes must notice
        self._free.append(block)

    def _renumber(self, block: int) -> None:
        self._generation[block] += 1
        if self._shared is not None:
            self._shared[block] = self._generation[block]

    def _end(self, holder: AttemptKey) -> bool:
        lease = self._leases.pop(holder, None)
        if lease is None:
            return False
        lease.ended = True
        for block in reversed(lease.blocks):
            self._drop(block)
        if len(self._ends) > 2 * len(self._leases) + 64:  # ended leases wait in the heap; they must not pile up
            self._ends = [entry for entry in self._ends if not entry[3].ended]
            heapify(self._ends)
        return True

    def _push(self, until: float, holder: AttemptKey, lease: _Lease) -> None:
        self._ends_pushed += 1  # makes entries distinct, so that a comparison never reaches the lease
        heappush(self._ends, (until, self._ends_pushed, holder, lease))

    def _check_states(self) -> None:
        free = set(self._free)
        assert len(free) == len(self._free), "a block is on the free list twice"
        assert not free & self._cached.keys(), "a block is both free and cached"
        for block in range(self._total):
            idle = block in free or block in self._cached
            assert (self._refs[block] == 0) == idle, f"block {block} has {self._refs[block]} references, idle is {idle}"
            assert (self._key[block] is not None) or block not in self._cached, f"block {block} is cached without a key"
            assert self._key[block] is None or block not in free, f"block {block} is free with a key"
            assert self._shared is None or int(self._shared[block]) == self._generation[block], (
                f"the generation word of block {block} was changed by someone else"
            )

    def _check_keys(self) -> None:
        committed = {key: block for block, key in enumerate(self._key) if key is not None}
        assert committed == self._by_key, "the key index and the blocks disagree"

    def _check_leases(self) -> None:
        leased = [0] * self._total
        for lease in self._leases.values():
            assert not lease.ended, "an ended lease is still listed"
            for block in lease.blocks:
                leased[block] += 1
        assert all(n <= refs for n, refs in zip(leased, self._refs, strict=True)), "a lease holds more than there is"
        listed = [id(entry[3]) for entry in self._ends if not entry[3].ended]
        assert sorted(listed) == sorted(map(id, self._leases.values())), "a lease would never expire"
