"""What routers tell each other about the service of tenants: sums that only grow, told as differences. Deciding code.

Each router adds what it served since it last told to a total in Redis and reads the total back; what the total grew by
beyond that, others served. Totals that shrink (a Redis that lost them) are begun anew, so nothing is charged twice. Until
Redis is back, what was served is kept to be told, and each router goes by its own counters and by what it had heard.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

TENANTS_MAX = 10_000
ROUNDING = 1e-6
"""Of a total: sums of fractions are not exact."""


class Service(NamedTuple):
    """Weighted tokens, for virtual counters, and plain ones, for quotas."""

    weighted: float = 0.0
    tokens: float = 0.0

    def plus(self, other: Service) -> Service:
        return Service(self.weighted + other.weighted, self.tokens + other.tokens)

    def beyond(self, other: Service) -> Service:
        return Service(max(self.weighted - other.weighted, 0.0), max(self.tokens - other.tokens, 0.0))


NOTHING = Service()


class Sharing:
    """One router's side. Memory is bounded: who was heard of longest ago is forgotten first."""

    def __init__(self) -> None:
        self.on = False  # somebody will call `to_tell`
        self._untold: OrderedDict[str, Service] = OrderedDict()
        self._totals: OrderedDict[str, Service] = OrderedDict()

    def served(self, tenant: str, weighted: float, tokens: float) -> None:
        if self.on:
            _put(self._untold, tenant, self._untold.get(tenant, NOTHING).plus(Service(weighted, tokens)))

    def to_tell(self, interesting: Iterable[str]) -> dict[str, Service]:
        """What to add to the totals now: of everybody served here, and of `interesting` ones to hear of them."""
        told, self._untold = self._untold, OrderedDict()
        return {**dict.fromkeys(interesting, NOTHING), **told}

    def not_told(self, untold: Mapping[str, Service]) -> None:
        """It did not arrive, or nobody knows: to be told again. Totals begin anew, so that none of it is taken for others'."""
        for tenant, service in untold.items():
            if service != NOTHING:
                _put(self._untold, tenant, self._untold.get(tenant, NOTHING).plus(service))
            self._totals.pop(tenant, None)

    def heard(self, told: Mapping[str, Service], totals: Sequence[Service]) -> dict[str, Service]:
        """What others served since, by tenant; `totals` are those after `told` was added, in its order."""
        elsewhere = {}
        for (tenant, mine), total in zip(told.items(), totals, strict=True):
            known = self._totals.get(tenant)
            _put(self._totals, tenant, total)
            if known is None:
                continue  # a beginning: what was before it is history, whoever waits here was lifted over it
            others = total.beyond(known.plus(mine))
            if others.weighted > ROUNDING * max(total.weighted, 1.0):
                elsewhere[tenant] = others
        return elsewhere


def _put(table: OrderedDict[str, Service], tenant: str, service: Service) -> None:
    table[tenant] = service
    table.move_to_end(tenant)
    while len(table) > TENANTS_MAX:
        table.popitem(last=False)
