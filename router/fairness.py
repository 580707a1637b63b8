"""Whose turn it is among tenants: virtual token counters. Deciding code; time plays no part in it.

Each tenant has a counter of the service it received, in weighted tokens. The next request is that of the waiting tenant
with the smallest counter. A tenant that comes back is lifted to those who wait, so idling saves up nothing. Source: Sheng
et al., "Fairness in Serving Large Language Models" (OSDI 2024), algorithm 2 (VTC) and section 4.3 (weights).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from types import MappingProxyType

from router.heap import KeyedHeap

INPUT_WEIGHT, OUTPUT_WEIGHT = 1.0, 2.0
"""Service in one prompt token and in one generated token, as in the paper (section 5.1)."""
IDLE_TENANTS_MAX = 10_000
NO_WEIGHTS: Mapping[str, float] = MappingProxyType({})


class VirtualCounters:
    """Counters of all tenants, and how many requests of each wait. Calls are O(log n), but for `order` and `snapshot`.

    `weights`: a tenant of weight 2 is due twice the service of one of weight 1, which is what unnamed tenants have.
    Between two tenants that wait all the time, service per weight never differs by more than
    2 · max(INPUT_WEIGHT · longest prompt, OUTPUT_WEIGHT · tokens that can be generated at a time) (theorem 4.4), plus what
    other routers serve between two exchanges (`router.sharing`), or times the number of routers when they share nothing.
    """

    def __init__(self, weights: Mapping[str, float] = NO_WEIGHTS) -> None:
        assert all(weight > 0 for weight in weights.values()), "a weight is positive"
        self._weights = weights
        self._waiting: dict[str, int] = {}
        self._active: dict[str, float] = {}  # counters of those who wait
        self._idle: OrderedDict[str, float] = OrderedDict()  # of the others, the longest idle foremost
        self._least = KeyedHeap()  # of those who wait, by a counter they had
        self._last_left = 0.0  # the counter of the tenant whose last request left an otherwise empty queue

    def counter(self, tenant: str) -> float:
        return self._active[tenant] if tenant in self._active else self._idle.get(tenant, 0.0)

    def waiting(self, tenant: str) -> int:
        return self._waiting.get(tenant, 0)

    def others(self, tenant: str) -> bool:
        """Whether any other tenant is known."""
        return len(self._active) + len(self._idle) > (tenant in self._active or tenant in self._idle)

    def arrive(self, tenant: str) -> None:
        """A request of the tenant begins to wait."""
        if tenant not in self._waiting:
            floor = self._smallest() if self._waiting else self._last_left
            self._active[tenant] = max(self._idle.pop(tenant, 0.0), floor)
            self._least.set(tenant, (self._active[tenant],))
        self._waiting[tenant] = self.waiting(tenant) + 1

    def leave(self, tenant: str) -> None:
        """A request of the tenant waits no longer, whatever became of it."""
        left = self.waiting(tenant) - 1
        assert left >= 0, f"more requests of tenant {tenant!r} left the queue than came"
        if left:
            self._waiting[tenant] = left
            return
        del self._waiting[tenant]
        self._least.discard(tenant)
        counter = self._active.pop(tenant)
        self._rest(tenant, counter)
        if not self._waiting:
            self._last_left = counter

    def charge_input(self, tenant: str, tokens: int) -> None:
        """The tenant's request was taken: its prompt will be computed."""
        self.charge(tenant, INPUT_WEIGHT * tokens)

    def charge_output(self, tenant: str, tokens: int) -> None:
        self.charge(tenant, OUTPUT_WEIGHT * tokens)

    def charge(self, tenant: str, service: float) -> None:
        """So many weighted tokens were computed for the tenant, here or elsewhere."""
        assert service >= 0, "service is never taken back"
        counter = self.counter(tenant) + service / self._weights.get(tenant, 1.0)
        if tenant in self._active:
            self._active[tenant] = counter
        else:
            self._rest(tenant, counter)

    def order(self) -> list[str]:
        """The tenants that wait, who is next first; ties by name, so that the same state gives the same answer."""
        return sorted(self._waiting, key=lambda tenant: (self._active[tenant], tenant))

    def tenants_waiting(self) -> list[str]:
        return list(self._waiting)

    def snapshot(self) -> dict[str, float]:
        return {**self._idle, **self._active}

    def _smallest(self) -> float:
        """Of those who wait. Counters only grow, so an entry that is outdated is too early."""
        while (first := self._least.first()) is not None:
            tenant, (counter,) = first
            if self._active[tenant] <= counter:
                return counter
            self._least.set(tenant, (self._active[tenant],))
        return self._last_left

    def _rest(self, tenant: str, counter: float) -> None:
        """Forgets who has been idle for longest; coming back, such a tenant is lifted to the others anyway."""
        self._idle[tenant] = counter
        self._idle.move_to_end(tenant)
        while len(self._idle) > IDLE_TENANTS_MAX:
            self._idle.popitem(last=False)
