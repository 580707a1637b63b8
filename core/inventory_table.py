"""The columns of an inventory and the moves of a block between its states. Deciding code; the inventory holds the lock."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Iterable, MutableSequence, Sequence
from threading import Lock
from typing import NamedTuple

from core.blocks import BlockKey
from core.eviction import IdleQueue, make_queue, make_ranks
from core.histogram import Histogram
from core.inventory_changes import ChangeLog
from core.inventory_leases import Leases
from core.inventory_shares import SharedQueue

_IDLE_SECONDS = (0.1, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14400.0, 86400.0)


class BlockCounts(NamedTuple):
    """Blocks by state; `free + cached + active == total`. Free and cached ones can be allocated."""

    total: int
    free: int
    cached: int
    active: int


class Victim(NamedTuple):
    """A block that is evicted soon, held by a reference meanwhile."""

    block: int
    key: BlockKey
    digest: int


class Entry(NamedTuple):
    """A resident block, for tools. `hits` are the uses after the first.

    `age_s` is the time since it was committed, `idle_s` that since it was last in use, 0 while somebody holds it. Without a
    clock both are 0.
    """

    key: BlockKey
    block: int
    digest: int
    tenant: bytes
    hits: int
    cost_s: float
    references: int
    pinned: bool
    age_s: float
    idle_s: float


class Evictions:
    """What left the cache: blocks evicted for space, blocks evicted because somebody asked, and how long they had been idle.

    Without a clock nobody knows for how long: `idle_s` stays empty.
    """

    def __init__(self) -> None:
        self.for_space = 0
        self.asked = 0
        self.idle_s = Histogram(_IDLE_SECONDS)


class BlockTable:
    """What is true of each block, by its number. A method here takes a block from one state to the next and no lock."""

    def __init__(
        self,
        num_blocks: int,
        generations: MutableSequence[int] | None,
        policy: str,
        tenant_share: float,
        pinned_max: int | None,
        clock: Callable[[], float] | None,
    ) -> None:
        assert num_blocks > 0, "an inventory needs at least one block"
        assert generations is None or len(generations) >= num_blocks, "one generation word per block"
        assert 0 < tenant_share <= 1, "a share is a part of the whole"
        assert pinned_max is None or 0 <= pinned_max <= num_blocks, "of all blocks"
        self._lock = Lock()
        self._total = num_blocks
        self._words = generations
        # Ours is the truth; what others can map is only ever written.
        self._generation = [0] * num_blocks if generations is None else [int(generations[b]) for b in range(num_blocks)]
        self._refs = [0] * num_blocks
        self._key: list[BlockKey | None] = [None] * num_blocks
        self._digest = [0] * num_blocks
        self._hits = [0] * num_blocks
        self._cost_s = [0.0] * num_blocks
        self._tenant = [b""] * num_blocks
        self._has_tenants = self._has_costs = False
        self._by_key: dict[BlockKey, int] = {}
        self._free = list(range(num_blocks - 1, -1, -1))
        self._pinned: dict[int, float] = {}  # since when idle, for those that nobody holds
        self._pinned_max = num_blocks // 2 if pinned_max is None else pinned_max
        self._unshared: set[int] = set()  # committed for this node alone
        self._committed_at = array("d", bytes(8 * num_blocks))
        # Blocks that are held by those who only look at them keep their place: in the queue until it comes up, and then
        # at the front, where they go back to when nobody used them meanwhile (idle since).
        self._parked: set[int] = set()
        self._looked_at: dict[int, float] = {}
        self._leases = Leases()
        self._log = ChangeLog()
        self._logs: tuple[ChangeLog, ...] = (self._log,)
        self._clock = clock
        self.evictions = Evictions()
        self.typical_cost_s = 0.0
        """What computing a block takes where nobody says more of it."""
        ranks = self._ranks = make_ranks(policy, self._hits, self._cost_s)
        self._shares: SharedQueue | None = None
        self._idle: IdleQueue = make_queue(ranks)
        if tenant_share < 1:
            limit = max(1, int(num_blocks * tenant_share))
            self._idle = self._shares = SharedQueue(lambda: make_queue(ranks), self._tenant, limit)

    def follow(self) -> ChangeLog:
        """One more reader of changes, until `unfollow`; both from one thread. Each costs every commit and eviction a little."""
        self._logs = (*self._logs, log := ChangeLog())
        return log

    def unfollow(self, log: ChangeLog) -> None:
        """Idempotent."""
        self._logs = tuple(other for other in self._logs if other is not log)

    def _now(self) -> float:
        return 0.0 if self._clock is None else self._clock()

    def _leave(self, block: int, since: float, now: float) -> None:
        """Cached to nameless; the block is out of the queue already."""
        key = self._key[block]
        assert key is not None
        del self._by_key[key]
        self._key[block] = None
        self._hits[block] = 0
        if self._clock is not None:
            self.evictions.idle_s.observe(now - since)
        if block in self._unshared:
            self._unshared.remove(block)
        else:
            for log in self._logs:
                if log.followed:
                    log.went(key)
        if self._ranks is not None:
            self._ranks.forget(block)
            self._cost_s[block] = 0.0

    def _leave_all(self, idle: list[tuple[int, float]], now: float) -> list[int]:
        """As `_leave`, of blocks that nothing ranks, each with the time since when it was idle. Returns the blocks."""
        blocks, names, by_key, hits = [block for block, _ in idle], self._key, self._by_key, self._hits
        keys = [names[block] or b"" for block in blocks]
        for block, key in zip(blocks, keys, strict=True):
            del by_key[key]
            names[block] = None
            hits[block] = 0
        if self._clock is not None:
            for _, since in idle:
                self.evictions.idle_s.observe(now - since)
        if self._unshared:
            keys = [key for block, key in zip(blocks, keys, strict=True) if block not in self._unshared]
            self._unshared.difference_update(blocks)
        for log in self._logs:
            if log.followed:
                log.went_all(keys)
        return blocks

    def _tenanted(self, tenant: bytes) -> bool:
        """Whether the column of tenants is in use: most nodes never see one."""
        self._has_tenants = self._has_tenants or bool(tenant)
        return self._has_tenants

    def _costed(self, cost_s: float) -> bool:
        """Whether the column of costs is in use."""
        self._has_costs = self._has_costs or bool(cost_s)
        return self._has_costs

    def _take(self, block: int) -> None:
        if not self._refs[block]:
            self._wake(block)
        self._refs[block] += 1

    def _wake(self, block: int) -> None:
        """Cached, or pinned and idle, to active."""
        if block not in self._pinned:
            try:
                self._idle.remove(block)
            except KeyError:
                raise AssertionError(f"block {block} is free: nobody can take a reference on it") from None

    def _used(self, blocks: Iterable[int]) -> None:
        """Takes their places from blocks that were only looked at."""
        for block in blocks:
            self._looked_at.pop(block, None)
            if block in self._parked:
                self._parked.remove(block)
                self._idle.remove(block)

    def _pop_past(self, block: int, since: float, tenant: bytes | None, claim: int) -> tuple[int, float]:
        """What is popped instead of a block that somebody looks at: the first that nobody does."""
        while block in self._parked:
            self._parked.remove(block)
            self._looked_at[block] = since
            if self._shares is not None:
                self._shares.charge(self._tenant[block], 1)  # it was popped and stays
            block, since = self._idle.pop() if self._shares is None or tenant is None else self._shares.pop_for(tenant, claim)
        return block, since

    def _release(self, blocks: Sequence[int]) -> None:
        """Drops references, last first. Active to cached or free where it was the last one."""
        refs, keys, add = self._refs, self._key, self._idle.add
        now = 0.0 if self._clock is None else self._clock()
        looking = bool(self._parked or self._looked_at)
        if self._ranks is not None:
            self._ranks.let_go([b for b in blocks if not self._is_looked_at(b)] if looking else blocks)
        special = looking or bool(self._pinned)
        for block in reversed(blocks):
            left = refs[block] - 1
            assert left >= 0, f"block {block} is released by nobody who holds it"
            refs[block] = left
            if left:
                continue
            if keys[block] is None:
                self._free_up(block)
            elif special:
                self._rest(block, now)
            else:
                add(block, now)

    def _rest(self, block: int, now: float) -> None:
        since = self._looked_at.pop(block, None)
        if block in self._pinned:
            self._pinned[block] = now if since is None else since
            return
        if block in self._parked:
            self._parked.remove(block)  # it never left its place
            return
        if since is None:
            self._idle.add(block, now)
        else:
            self._idle.add_first(block, since)

    def _look_at_next(self, count: int) -> list[int]:
        """The next to be evicted, each active now by one reference."""
        found: list[int] = []
        while len(found) < count and len(self._idle) > len(self._parked):
            block = self._idle.next()
            self._looked_at[block] = self._idle.remove(block)
            if block in self._parked:  # somebody else looks at it, perhaps for the same reason
                self._parked.remove(block)
                continue
            self._refs[block] = 1
            if self._shares is not None:
                self._shares.charge(self._tenant[block], -1)  # as if gone, for the choice of those after it
            found.append(block)
        if self._shares is not None:
            for block in found:
                self._shares.charge(self._tenant[block], 1)
        return found

    def _is_looked_at(self, block: int) -> bool:
        return block in self._parked or block in self._looked_at

    def _free_up(self, block: int) -> None:
        """Nameless to free. A late reader of freed bytes must notice, so the generation changes."""
        generation = self._generation[block] = self._generation[block] + 1
        if self._words is not None:
            self._words[block] = generation
        if self._ranks is not None:
            self._ranks.forget(block)
        self._free.append(block)

    def _check_blocks(self, touched: Collection[int]) -> None:
        """As `_check_states` and `_check_keys`, where they held before these blocks were touched and nothing else was since.

        What came free lies at the end of the free list then.
        """
        tail = self._free[max(len(self._free) - len(touched), 0) :]
        free = set(tail)
        unheld = len(self._free) + len(self._idle) - len(self._parked) + sum(not self._refs[b] for b in self._pinned)
        assert unheld == self._refs.count(0), "a block that nobody holds is on the free list twice, or nowhere"
        assert len(self._by_key) == self._total - self._key.count(None), "the key index and the blocks disagree"
        refs, names, by_key, idle = self._refs, self._key, self._by_key, self._idle
        plain = self._words is None and not (self._pinned or self._parked or self._looked_at)
        for block in touched:
            key, is_free = names[block], block in free
            assert key is None or by_key.get(key) == block, "the key index and the blocks disagree"
            count, cached = refs[block], block in idle
            active = count > 0 and not is_free and not cached
            resting = count == 0 and cached == (key is not None) and is_free == (key is None)
            if not (plain and (active or resting)):  # not surely in one of its three states: looked at in full
                self._check_state(block, is_free)
        self._check_places()

    def _check_states(self) -> None:
        free = set(self._free)
        assert len(free) == len(self._free), "a block is on the free list twice"
        assert len(self._idle) == sum(b in self._idle for b in range(self._total)), "the queue of idle blocks is miscounted"
        for block in range(self._total):
            self._check_state(block, block in free)
        self._check_places()

    def _check_state(self, block: int, free: bool) -> None:
        refs, pinned = self._refs[block], block in self._pinned
        cached = block in self._idle and block not in self._parked
        states = [free, cached, refs > 0 or pinned]
        assert sum(states) == 1, f"block {block} is in not exactly one state: free, cached, active are {states}"
        assert refs >= 0, f"block {block} has {refs} references"
        assert self._key[block] is not None or not (cached or pinned), f"block {block} is kept without a key"
        assert self._key[block] is None or not free, f"block {block} is free with a key"
        assert self._words is None or int(self._words[block]) == self._generation[block], (
            f"the generation word of block {block} was changed by someone else"
        )

    def _check_places(self) -> None:
        if not (self._looked_at or self._parked):
            return
        assert all(self._refs[block] for block in self._looked_at), "a place is kept for a block that nobody looks at"
        assert all(self._refs[block] and block in self._idle for block in self._parked), "a place is kept for nobody"
        assert not self._parked & (self._looked_at.keys() | self._pinned.keys()), "a block has two places"

    def _check_keys(self) -> None:
        committed = {key: block for block, key in enumerate(self._key) if key is not None}
        assert all(self._key[block] is not None for block in self._unshared), "a nameless block is kept from others"
        assert len(self._pinned) <= self._pinned_max, "more is pinned than may be"
        assert committed == self._by_key, "the key index and the blocks disagree"
        assert all(len(log) <= 2 * self._total for log in self._logs), "changes pile up"
        if self._shares is not None:
            self._shares.check([self._tenant[block] for block in committed.values()])
