"""Whose turn it is among tenants: virtual token counters. Deciding code; time plays no part in it.

Each tenant has a counter of the service it received, in weighted tokens. The next request is that of the waiting tenant
with the smallest counter. A tenant that comes back is lifted to those who wait, so idling saves up nothing. Source: Sheng
et al., "Fairness in Serving Large Language Models" (OSDI 2024), algorithm 2 (VTC) and section 4.3 (weights).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from types import MappingProxyType

INPUT_WEIGHT, OUTPUT_WEIGHT = 1.0, 2.0
"""Service in one prompt token and in one generated token, as in the paper (section 5.1)."""
IDLE_TENANTS_MAX = 10_000
NO_WEIGHTS: Mapping[str, float] = MappingProxyType({})


class VirtualCounters:
    """Counters of all tenants, and how many requests of each wait.

    `weights`: a tenant of weight 2 is due twice the service of one of weight 1, which is what unnamed tenants have.
    Between two tenants that wait all the time, service per weight never differs by more than
    2 · max(INPUT_WEIGHT · longest prompt, OUTPUT_WEIGHT · tokens that can be generated at a time) (theorem 4.4), times the
    number of routers when these do not share their counters.
    """

    def __init__(self, weights: Mapping[str, float] = NO_WEIGHTS) -> None:
        assert all(weight > 0 for weight in weights.values()), "a weight is positive"
        self._weights = weights
        self._waiting: dict[str, int] = {}
        self._counters: OrderedDict[str, float] = OrderedDict()  # idle ones first, the longest idle foremost
        self._last_left = 0.0  # the counter of the tenant whose last request left an otherwise empty queue

    def counter(self, tenant: str) -> float:
        return self._counters.get(tenant, 0.0)

    def waiting(self, tenant: str) -> int:
        return self._waiting.get(tenant, 0)

    def arrive(self, tenant: str) -> None:
        """A request of the tenant begins to wait."""
        if tenant not in self._waiting:
            others = [self.counter(other) for other in self._waiting]
            floor = min(others) if others else self._last_left
            self._counters[tenant] = max(self.counter(tenant), floor)
            self._trim()
        self._waiting[tenant] = self.waiting(tenant) + 1

    def leave(self, tenant: str) -> None:
        """A request of the tenant waits no longer, whatever became of it."""
        left = self.waiting(tenant) - 1
        assert left >= 0, f"more requests of tenant {tenant!r} left the queue than came"
        if left:
            self._waiting[tenant] = left
            return
        del self._waiting[tenant]
        if not self._waiting:
            self._last_left = self.counter(tenant)

    def charge_input(self, tenant: str, tokens: int) -> None:
        """The tenant's request was taken: its prompt will be computed."""
        self._charge(tenant, INPUT_WEIGHT * tokens)

    def charge_output(self, tenant: str, tokens: int) -> None:
        self._charge(tenant, OUTPUT_WEIGHT * tokens)

    def order(self) -> list[str]:
        """The tenants that wait, who is next first; ties by name, so that the same state gives the same answer."""
        return sorted(self._waiting, key=lambda tenant: (self.counter(tenant), tenant))

    def raise_to(self, counters: Mapping[str, float]) -> None:
        """Takes over what other routers have counted, where it is more."""
        for tenant, counter in counters.items():
            if counter > self.counter(tenant):
                self._set(tenant, counter)

    def snapshot(self) -> dict[str, float]:
        return dict(self._counters)

    def _charge(self, tenant: str, service: float) -> None:
        assert service >= 0, "service is never taken back"
        self._set(tenant, self.counter(tenant) + service / self._weights.get(tenant, 1.0))

    def _set(self, tenant: str, counter: float) -> None:
        self._counters[tenant] = counter
        self._counters.move_to_end(tenant)
        self._trim()

    def _trim(self) -> None:
        """Forgets who has been idle for longest; coming back, such a tenant is lifted to the others anyway."""
        while len(self._counters) > IDLE_TENANTS_MAX + len(self._waiting):
            tenant = next(name for name in self._counters if name not in self._waiting)
            del self._counters[tenant]
