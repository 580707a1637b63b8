"""Which idle block goes next: eviction policies by name, behind one Protocol.

Deciding code. An idle block is committed, held by nobody and not pinned; the inventory keeps these, and only these, in
an `IdleQueue`. Policies:

    lru    the one that has been idle longest; every operation O(1)
    lfu    the one used least, with ageing: LFU-DA of Arlitt, Cherkasova, Dilley, Friedrich and Jin, "Evaluating Content
           Management Techniques for Web Proxy Caches" (SIGMETRICS PER 27(4), 2000)
    cost   the one whose loss costs least: GreedyDual-Size-Frequency of Cherkasova, "Improving WWW Proxies Performance
           with Greedy-Dual-Size-Frequency Caching Policy" (HP Labs, HPL-98-69R1, 1998)

The last two are one rule, O(log n) amortised: a block's rank is `L + uses x cost / size` when it is let go, where L is
the rank of the block evicted last and cost / size is 1 for `lfu` and the seconds that computing it again takes for
`cost` (blocks of one node are equal in size, so size drops out). L only grows, so an old favourite that is not used any
more falls behind.

A block of a prompt is useless without all before it, and later blocks cost more to compute than earlier ones: by the
plain rule a prefix would go before its tail. So losing a block is taken to cost what losing any block behind it costs:
its rank is at least that of every block that was let go behind it. Whoever holds a block must hold its prefix too.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from heapq import heapify, heappop, heappush
from typing import NamedTuple, Protocol

from core.errors import ConfigError

POLICIES = ("lru", "lfu", "cost")


class IdleQueue(Protocol):
    """Idle blocks in the order in which they are evicted, each with the time since when it is idle."""

    def __len__(self) -> int: ...

    def __contains__(self, block: object, /) -> bool: ...

    def add(self, block: int, since: float, /) -> object:
        """The block became idle after use. Blocks of one sequence come last first."""

    def add_first(self, block: int, since: float, /) -> None:
        """The block was looked at, not used: it goes before all that ranks like it."""

    def remove(self, block: int, /) -> float:
        """Takes a block out and says since when it was idle; KeyError when it is not here."""

    def since(self) -> dict[int, float]:
        """Every block here with the time since when it is idle, a copy."""

    def next(self) -> int:
        """The block that goes next; the queue is not empty."""

    def pop(self) -> tuple[int, float]:
        """Takes out the block that goes next, to be evicted."""


class LruQueue:
    """Least recently let go first."""

    __slots__ = ("_order", "add", "pop", "remove")

    def __init__(self) -> None:
        self._order: OrderedDict[int, float] = OrderedDict()  # oldest first
        # The engine's every release and match come here: bound methods of the dictionary spare a Python call per block.
        self.add = self._order.setdefault
        self.remove = self._order.pop
        self.pop: Callable[[], tuple[int, float]] = partial(self._order.popitem, False)

    def __len__(self) -> int:
        return len(self._order)

    def __contains__(self, block: object) -> bool:
        return block in self._order

    def add_first(self, block: int, since: float) -> None:
        self._order[block] = since
        self._order.move_to_end(block, last=False)

    def since(self) -> dict[int, float]:
        return dict(self._order)

    def next(self) -> int:
        return next(iter(self._order))


class Ranks:
    """Ranks of blocks by use and cost: what several queues of one inventory share.

    `hits` (uses after the first) and `cost_s` are the inventory's columns, read when blocks are let go; without costs all
    blocks weigh the same.
    """

    def __init__(self, hits: Sequence[int], cost_s: Sequence[float] | None) -> None:
        self._hits = hits
        self._cost_s = cost_s
        self._rank = [0.0] * len(hits)
        self._age = 0.0  # "L"

    def __getitem__(self, block: int) -> float:
        return self._rank[block]

    def let_go(self, blocks: Sequence[int]) -> None:
        """Ranks the blocks of one sequence, given in its order, some of which others may still hold."""
        age, hits, cost_s, rank, behind = self._age, self._hits, self._cost_s, self._rank, 0.0
        for block in reversed(blocks):
            worth = hits[block] + 1.0
            if cost_s is not None:
                worth *= cost_s[block]
            behind = rank[block] = max(behind, rank[block], age + worth)

    def forget(self, block: int) -> None:
        """The block gets other content."""
        self._rank[block] = 0.0

    def evicted(self, rank: float) -> None:
        self._age = max(self._age, rank)


class _Place(NamedTuple):
    rank: float
    order: int  # of arrival among equals; below zero for what was put first
    since: float


class RankQueue:
    """Lowest rank first, and among equals what has been idle longest. Stale entries of the heap go when they come up."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._places: dict[int, _Place] = {}
        self._heap: list[tuple[float, int, int]] = []
        self._added = 0

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, block: object) -> bool:
        return block in self._places

    def add(self, block: int, since: float) -> None:
        self._added += 1
        self._put(block, self._added, since)

    def add_first(self, block: int, since: float) -> None:
        self._added += 1
        self._put(block, -self._added, since)

    def remove(self, block: int) -> float:
        return self._places.pop(block).since

    def since(self) -> dict[int, float]:
        return {block: place.since for block, place in self._places.items()}

    def next(self) -> int:
        heap, places = self._heap, self._places
        while True:
            rank, order, block = heap[0]
            place = places.get(block)
            if place is not None and place.order == order and place.rank == rank:
                return block
            heappop(heap)

    def pop(self) -> tuple[int, float]:
        block = self.next()
        heappop(self._heap)
        place = self._places.pop(block)
        self._ranks.evicted(place.rank)
        return block, place.since

    def _put(self, block: int, order: int, since: float) -> None:
        rank = self._ranks[block]
        self._places[block] = _Place(rank, order, since)
        heappush(self._heap, (rank, order, block))
        if len(self._heap) > 2 * len(self._places) + 64:
            self._heap = [(place.rank, place.order, block) for block, place in self._places.items()]
            heapify(self._heap)


def make_ranks(policy: str, hits: Sequence[int], cost_s: Sequence[float]) -> Ranks | None:
    """What the queues of `policy` go by, None where the order of release is all. Raises ConfigError for an unknown name."""
    if policy == "lru":
        return None
    if policy == "lfu":
        return Ranks(hits, None)
    if policy == "cost":
        return Ranks(hits, cost_s)
    raise ConfigError(f"there is no eviction policy {policy!r}; choose one of {', '.join(POLICIES)}")


def make_queue(ranks: Ranks | None) -> IdleQueue:
    return LruQueue() if ranks is None else RankQueue(ranks)
