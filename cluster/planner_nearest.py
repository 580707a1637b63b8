"""Why a plan cannot meet its limits, and the nearest limits that can be met. Deciding code."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from cluster.planner_analytic import Analytic
from cluster.planner_offers import Offer, Pools, Workload
from cluster.planner_sizes import candidates
from core.request import Slo

FACTOR_MAX = 1e4
PRECISION = 1.02


class Nearest(NamedTuple):
    """`binding`: "ttft", "tbt", both, or "memory". `pools`: that serve `rate_rps` within `slo`; empty where no time helps."""

    binding: str
    slo: Slo
    pools: Pools
    rate_rps: float


def nearest(workload: Workload, offers: Sequence[Offer], slo: Slo, share: float, rate_rps: float) -> Nearest:
    """Relaxes the limit that binds, both by the same factor where each does, as little as it takes at `rate_rps`."""

    def pools_at(limits: Slo) -> Pools:
        found = candidates(workload, offers, limits, Analytic(workload, limits), rate_rps, share, 1)
        return found[0] if found else ()

    if slo.ttft_s is not None and pools_at(replace(slo, ttft_s=None)):
        names: tuple[str, ...] = ("ttft_s",)
    elif slo.tbt_s is not None and pools_at(replace(slo, tbt_s=None)):
        names = ("tbt_s",)
    else:
        names = ("ttft_s", "tbt_s")

    def relaxed(factor: float) -> Slo:
        limits = {name: value * factor for name in names if (value := getattr(slo, name)) is not None}
        return replace(slo, **limits)

    binding = " and ".join(name.removesuffix("_s") for name in names)
    low, high = 1.0, FACTOR_MAX
    pools = pools_at(relaxed(high))
    if not pools:
        return Nearest("memory", slo, (), rate_rps)
    while high > PRECISION * low:
        middle = math.sqrt(low * high)
        if better := pools_at(relaxed(middle)):
            high, pools = middle, better
        else:
            low = middle
    return Nearest(binding, relaxed(high), pools, rate_rps)
