"""Who waits for a place, and who is next. Deciding code.

Requests that already have tokens out (failovers) go first. Then the class of the highest priority; within it the tenant
that was served least (`router.fairness`); within that, `router.order`. So that nobody starves, one place in
`AGED_EVERY` goes to whoever has waited longest, once that is longer than `aging_s`: from then on a request waits for at most
`AGED_EVERY` places for itself and each of those that came before it, and no policy may keep it waiting when its turn has come.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from router.fairness import VirtualCounters
from router.heap import KeyedHeap
from router.order import Fcfs, Order, Waiting

AGED_EVERY = 4
STANDSTILL_S = 1.0
"""After which, when nobody has had a place, the overdue go: a policy may have kept all of them waiting."""
WHOLE: Mapping[str, float] = MappingProxyType({})


class WaitQueue:
    """A head that probes for a place keeps its turn: a refusal costs it nothing. Operations are O(log n).

    `shares`: part of `max_waiting` that a class may fill, 1 where it is not named.
    """

    def __init__(
        self,
        max_waiting: int,
        order: Callable[[], Order] = Fcfs,
        counters: VirtualCounters | None = None,
        aging_s: float = float("inf"),
        shares: Mapping[str, float] = WHOLE,
    ) -> None:
        self.bound = max_waiting
        self.begins_s: Callable[[float], Sequence[float]] = lambda now: ()  # when places begin with the next prompt
        self._order = order
        self._counters = counters or VirtualCounters()
        self._aging_s = aging_s
        self._shares = shares
        self._urgent: OrderedDict[str, None] = OrderedDict()
        self._new: OrderedDict[str, Waiting] = OrderedDict()  # the first has waited longest
        self._levels: dict[int, _Level] = {}
        self._ranks: list[int] = []  # negated priorities of the levels, sorted
        self._by_class: Counter[str] = Counter()
        self._passed_over = 0  # places given to others while the longest waiting was overdue
        self._moved_at = -math.inf  # when somebody had the last place, or began to wait alone
        self._yields_until = -math.inf  # until then who is late goes behind everybody who is not

    def __len__(self) -> int:
        return len(self._urgent) + len(self._new)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._urgent or request_id in self._new

    def full_for(self, tenant: str, slo_class: str, more: int = 1) -> str:
        """Why there is no room for `more` new requests like this; empty when there is. A failover is always let in.

        Of several tenants each may fill no more than what it leaves free, so that one that floods the queue shuts nobody
        out (dynamic thresholds: Choudhury and Hahne, 1998).
        """
        waiting, bound = len(self) + more, self.bound
        if waiting > bound:
            return f"{len(self)} requests wait already (router.max_queue is {bound})"
        share = self._shares.get(slo_class, 1.0)
        if share < 1 and self._by_class[slo_class] + more > max(1, int(share * bound)):
            return (
                f"{self._by_class[slo_class]} requests of class {slo_class} wait already, of {bound} in all (its queue_share)"
            )
        mine = self._counters.waiting(tenant)
        if mine + more > 1 and mine + more > bound - waiting + 1 and self._counters.others(tenant):
            return f"{mine} requests of tenant {tenant} wait already, of {bound} in all (the rest is for other tenants)"
        return ""

    def waiting(self, request_id: str) -> Waiting | None:
        """None: it does not wait, or as a failover."""
        return self._new.get(request_id)

    def add(self, waiting: Waiting, *, urgent: bool = False) -> None:
        """Who waits already keeps its place."""
        if waiting.request_id in self:
            return
        if urgent:
            self._urgent[waiting.request_id] = None
            return
        if not self._new:
            self._moved_at = max(self._moved_at, waiting.since)
        self._new[waiting.request_id] = waiting
        self._counters.arrive(waiting.tenant)
        self._by_class[waiting.slo_class] += 1
        level = self._levels.get(waiting.priority)
        if level is None:
            level = self._levels[waiting.priority] = _Level(self._order, self._counters)
            insort(self._ranks, -waiting.priority)
        level.add(waiting)

    def remove(self, request_id: str) -> None:
        self._urgent.pop(request_id, None)
        waiting = self._new.pop(request_id, None)
        if waiting is None:
            return
        self._counters.leave(waiting.tenant)
        self._by_class[waiting.slo_class] -= 1
        level = self._levels[waiting.priority]
        level.discard(waiting)
        if not level.lines:
            del self._levels[waiting.priority]
            self._ranks.remove(-waiting.priority)

    def put_off(self, request_id: str, until: float) -> None:
        """It cannot keep its limits and waits for a lull: until then it, and all who are late, go behind who is not, of
        whatever tenant and class. A head that wants no place must not keep others from theirs."""
        self._yields_until = until
        waiting = self._new.get(request_id)
        if waiting is not None:
            self._levels[waiting.priority].lines[waiting.tenant].lost(request_id)

    def taken(self, request_id: str, now: float) -> None:
        """It has its place, and leaves the queue."""
        self._moved_at = now
        overdue = self._overdue(now)
        if request_id in self._new and overdue is not None:
            self._passed_over = 0 if request_id == overdue else self._passed_over + 1
        self.remove(request_id)

    def head(self, now: float) -> str | None:
        for request_id in self._urgent:
            return request_id
        overdue = self.turn_of_overdue(now)
        if overdue is not None:
            return overdue
        if not self._ranks:
            return None
        begins_s = self.begins_s(now) if len(self._new) > 1 else ()
        if now < self._yields_until:
            in_time = (self._levels[-rank].first_in_time(now, begins_s) for rank in self._ranks)
            found = next((name for name in in_time if name is not None), None)
            if found is not None:
                return found
        return self._levels[-self._ranks[0]].first(now, begins_s)

    def ahead_of(self, tenant: str, priority: int) -> int:
        """About how many requests would go before one of this tenant and priority that came now."""
        above = sum(self._levels[-rank].waiting for rank in self._ranks if -rank > priority)
        level = self._levels.get(priority)
        if level is None:
            return len(self._urgent) + above
        mine = len(level.lines.get(tenant, ()))
        return len(self._urgent) + above + min(level.waiting, (mine + 1) * len(level.lines))

    def turn_of_overdue(self, now: float) -> str | None:
        """Who has waited longest and for long, if it must be served now: others went before it, or nobody goes at all."""
        stands_still = now - self._moved_at >= STANDSTILL_S
        return self._overdue(now) if stands_still or self._passed_over >= AGED_EVERY - 1 else None

    def _overdue(self, now: float) -> str | None:
        for request_id, waiting in self._new.items():
            return request_id if now - waiting.since >= self._aging_s else None
        return None


class _Level:
    """Those of one priority: a line per tenant."""

    def __init__(self, order: Callable[[], Order], counters: VirtualCounters) -> None:
        self.lines: dict[str, Order] = {}
        self.waiting = 0
        self._make = order
        self._counters = counters
        self._turns = KeyedHeap()
        self._in_time = KeyedHeap()  # the turns of tenants of whom somebody may still be in time

    def add(self, waiting: Waiting) -> None:
        tenant = waiting.tenant
        line = self.lines.get(tenant)
        if line is None:
            line = self.lines[tenant] = self._make()
            self._turns.set(tenant, (self._counters.counter(tenant),))
        if tenant not in self._in_time:
            self._in_time.set(tenant, (self._counters.counter(tenant),))
        line.add(waiting)
        self.waiting += 1

    def discard(self, waiting: Waiting) -> None:
        line = self.lines[waiting.tenant]
        line.discard(waiting.request_id)
        self.waiting -= 1
        if not len(line):
            del self.lines[waiting.tenant]
            self._turns.discard(waiting.tenant)
            self._in_time.discard(waiting.tenant)

    def first(self, now: float, begins_s: Sequence[float]) -> str | None:
        tenant = self._served_least(self._turns)
        return self.lines[tenant].first(now, begins_s) if tenant is not None else None

    def first_in_time(self, now: float, begins_s: Sequence[float]) -> str | None:
        """None: all are late."""
        while (tenant := self._served_least(self._in_time)) is not None:
            found = self.lines[tenant].first(now, begins_s, in_time=True)
            if found is not None:
                return found
            self._in_time.discard(tenant)
        return None

    def _served_least(self, turns: KeyedHeap) -> str | None:
        """Counters only grow, so a turn that is outdated is too early: it is put right when it comes up."""
        while (turn := turns.first()) is not None:
            tenant, (counter,) = turn
            known = self._counters.counter(tenant)
            if known <= counter:
                return tenant
            turns.set(tenant, (known,))
        return None


class Pace:
    """How fast places come free while somebody waits for them: what a refused user is told to wait."""

    RETRY_MIN_S, RETRY_MAX_S = 1.0, 60.0
    _WEIGHT = 0.1  # of the newest gap

    def __init__(self) -> None:
        self._last_at: float | None = None
        self._gap_s = 0.0

    def accepted(self, now: float, *, others_wait: bool = True) -> None:
        """A request has got its place. When nobody waits for the next one, the time until then says nothing."""
        if self._last_at is not None:
            self._gap_s += self._WEIGHT * (now - self._last_at - self._gap_s)
        self._last_at = now if others_wait else None

    def wait_s(self, requests: int) -> float:
        """Seconds until so many more have theirs, by the moving average of the gaps."""
        return requests * self._gap_s

    def time_for(self, requests: int) -> float:
        """The same within sensible bounds, for who is to come back then."""
        return bounded_retry_s(self.wait_s(requests))


def bounded_retry_s(retry_after_s: float) -> float:
    return min(max(retry_after_s, Pace.RETRY_MIN_S), Pace.RETRY_MAX_S)
