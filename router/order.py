"""Who is next among the waiting requests of one class and tenant. Deciding code.

`slack`: whoever must start soonest to keep its limits; who can keep them no more goes behind those who can. Where the policy
says when places begin with the next prompt, those go first of whom most will keep their limits (`router.lookahead`).
`fcfs`: who came first. `mlfq`: skip-join multi-level feedback queue, quick prompts first (FastServe, section 4.1); requests
run here until they end, so nobody is demoted, and whoever has waited `PROMOTE_S` joins the first level.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from types import MappingProxyType
from typing import Protocol

from core.request import Slo
from router.attempt import NO_LIMITS
from router.heap import KeyedHeap
from router.lookahead import LOOKED_AHEAD, Job, most_in_time

UNLIMITED_S = 60.0
"""A request without limits counts as one that should start within this time."""
QUANTUM_S = 0.01
"""Of the first level of `mlfq`; each level's is twice that of the one before."""
LEVELS = 10
PROMOTE_S = 3.0


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request that waits since `since`. `prefill_s`: its prompt alone, on the quickest worker, cached blocks left out;
    `decode_s`: the tokens after it. Limits count from `arrived_at`. From `give_up_at` on it is of no use to wait."""

    request_id: str
    tenant: str = ""
    slo_class: str = ""
    priority: int = 0
    since: float = 0.0
    arrived_at: float = 0.0
    slo: Slo = NO_LIMITS
    deadline_s: float | None = None
    prefill_s: float = 0.0
    decode_s: float = 0.0
    give_up_at: float = math.inf

    @property
    def start_by(self) -> float:
        """The latest time to start at and keep the limits, by what is predicted; infinity without any."""
        start_by = math.inf
        if self.slo.ttft_s is not None:
            start_by = self.arrived_at + self.slo.ttft_s - self.prefill_s
        if self.deadline_s is not None:
            start_by = min(start_by, self.arrived_at + self.deadline_s - self.prefill_s - self.decode_s)
        return start_by


class Order(Protocol):
    """Of one class and tenant. Times never go back. `begins_s`: in how many seconds each place begins with the next prompt;
    `in_time`: only of those who may still keep their limits. `lost`: it cannot, whatever was predicted of it."""

    def __len__(self) -> int: ...
    def add(self, waiting: Waiting) -> None: ...
    def discard(self, request_id: str) -> None: ...
    def lost(self, request_id: str) -> None: ...
    def first(self, now: float, begins_s: Sequence[float] = (), *, in_time: bool = False) -> str | None: ...


class Fcfs:
    def __init__(self) -> None:
        self._line: OrderedDict[str, None] = OrderedDict()  # a plain dict is slow to find its first after many deletions

    def __len__(self) -> int:
        return len(self._line)

    def add(self, waiting: Waiting) -> None:
        self._line[waiting.request_id] = None

    def discard(self, request_id: str) -> None:
        self._line.pop(request_id, None)

    def lost(self, request_id: str) -> None:
        """Nobody goes before it for that."""

    def first(self, now: float, begins_s: Sequence[float] = (), *, in_time: bool = False) -> str | None:
        return next(iter(self._line), None)


class Slack:
    def __init__(self) -> None:
        self._in_time = KeyedHeap()
        self._late = Fcfs()
        self._jobs: OrderedDict[str, Job] = OrderedDict()  # of those in time: what they must have computed, by when
        self._added = 0

    def __len__(self) -> int:
        return len(self._in_time) + len(self._late)

    def add(self, waiting: Waiting) -> None:
        start_by = waiting.start_by
        if start_by == math.inf:
            start_by = waiting.arrived_at + UNLIMITED_S
        self._added += 1
        self._in_time.set(waiting.request_id, (start_by, self._added))
        self._jobs[waiting.request_id] = Job(start_by + waiting.prefill_s, waiting.prefill_s, waiting.request_id)

    def discard(self, request_id: str) -> None:
        self._in_time.discard(request_id)
        self._jobs.pop(request_id, None)
        self._late.discard(request_id)

    def lost(self, request_id: str) -> None:
        if request_id in self._in_time:
            self.discard(request_id)
            self._late.add(Waiting(request_id))

    def first(self, now: float, begins_s: Sequence[float] = (), *, in_time: bool = False) -> str | None:
        while (first := self._in_time.first()) is not None:
            name, (start_by, _) = first
            if start_by >= now:
                return self._ahead(name, now, begins_s) if len(begins_s) and len(self._jobs) > 1 else name
            self.lost(name)
        return None if in_time else self._late.first(now)

    def _ahead(self, first: str, now: float, begins_s: Sequence[float]) -> str:
        """Of the first to come; when none of them will be in time, the one that must start soonest."""
        kept = most_in_time(islice(self._jobs.values(), LOOKED_AHEAD), now, begins_s)
        return kept[0].name if kept else first


class Mlfq:
    def __init__(self) -> None:
        self._levels: list[OrderedDict[str, float]] = [OrderedDict() for _ in range(LEVELS)]  # since when
        self._level_of: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._level_of)

    def add(self, waiting: Waiting) -> None:
        quanta = max(waiting.prefill_s / QUANTUM_S, 1.0)
        level = LEVELS - 1 if quanta >= 2 ** (LEVELS - 1) else math.ceil(math.log2(quanta))
        self._level_of[waiting.request_id] = level
        self._levels[level][waiting.request_id] = waiting.since

    def discard(self, request_id: str) -> None:
        level = self._level_of.pop(request_id, None)
        if level is not None:
            del self._levels[level][request_id]

    def lost(self, request_id: str) -> None:
        """Its level says nothing of limits."""

    def first(self, now: float, begins_s: Sequence[float] = (), *, in_time: bool = False) -> str | None:
        for level in self._levels[1:]:
            while level and now - next(iter(level.values())) >= PROMOTE_S:
                name = next(iter(level))
                self._levels[0][name] = level.pop(name)
                self._level_of[name] = 0
        return next((name for level in self._levels for name in level), None)


ORDERS: Mapping[str, Callable[[], Order]] = MappingProxyType({"slack": Slack, "fcfs": Fcfs, "mlfq": Mlfq})
