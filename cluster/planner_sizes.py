"""How many replicas of which offers, by the quick judge: the candidates of a plan, cheapest first. Deciding code."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np

from cluster.planner_analytic import Analytic
from cluster.planner_offers import Market, Offer, Pool, Pools, Workload, gpus_of, shortage, usd_per_hour_of
from cluster.planner_sides import prompt_s
from core.request import Slo, WorkerRole

REPLICAS_MAX = 20_000
SPOT_SHARES = (0.0, 0.5, 0.75, 1.0)
PREFILLS_MAX = 6
"""Prefill pools of one size rule, the cheapest ones, that decode pools are sized for."""
CHUNKS = (256, 512, 1024, 2048, 4096)
"""Sizes of a colocated replica's chunks that are tried."""


class _Kind(NamedTuple):
    """Which offer in which role, and how much of it on a spot market."""

    role: WorkerRole
    offer: Offer
    spot: float

    def pools(self, replicas: int) -> Pools:
        spot = math.floor(self.spot * replicas) if self.spot < 1 else replicas
        both = ((Market.ON_DEMAND, replicas - spot), (Market.SPOT, spot))
        return tuple(Pool(self.role, self.offer, count, market) for market, count in both if count)


def candidates(
    workload: Workload, offers: Sequence[Offer], slo: Slo, quick: Analytic, rate_rps: float, share: float, count: int
) -> list[Pools]:
    """The cheapest of each way to split or not to split, `count` different ones; empty when nothing meets the limits."""
    found: list[tuple[float, int, int, Pools]] = []
    sized = (*_split(workload, offers, slo, quick, rate_rps, share), *_colocated(offers, quick, rate_rps, share))
    for pools in dict.fromkeys(sized):  # small pools are the same under several rules and mixes of markets
        found.append((usd_per_hour_of(pools), gpus_of(pools), len(found), pools))
    best = heapq.nsmallest(count, found)
    kinds = {pools[0].role is WorkerRole.COLOCATED for *_, pools in best}
    for cost, gpus, order, pools in sorted(found):  # the quick judge may err between the two ways: both are looked at closer
        if (pools[0].role is WorkerRole.COLOCATED) not in kinds:
            best[-1:] = [(cost, gpus, order, pools)] if len(best) >= count > 1 else [*best[-1:], (cost, gpus, order, pools)]
            break
    return [pools for *_, pools in best]


def _kinds(role: WorkerRole, offers: Sequence[Offer]) -> Iterator[_Kind]:
    for offer in offers:
        for spot in SPOT_SHARES:
            if (spot < 1 and offer.on_demand is None) or (spot > 0 and offer.spot is None):
                continue
            yield _Kind(role, offer, spot)


def _colocated(offers: Sequence[Offer], quick: Analytic, rate_rps: float, share: float) -> Iterator[Pools]:
    for offer in offers:
        chunked = [replace(offer, step_tokens=tokens) for tokens in CHUNKS]
        for kind in _kinds(WorkerRole.COLOCATED, chunked):
            if sized := _fewest(kind, lambda pools: quick(pools, rate_rps).joint >= share):
                yield sized


def _split(
    workload: Workload, offers: Sequence[Offer], slo: Slo, quick: Analytic, rate_rps: float, share: float
) -> Iterator[Pools]:
    """Prefill pools are sized for several shares of TTFT alone, decode pools for what these leave of the joint share."""
    plenty = Pool(WorkerRole.DECODE, offers[0], REPLICAS_MAX)
    able = [
        kind
        for kind in _kinds(WorkerRole.PREFILL, offers)
        if np.mean(prompt_s(kind.offer, workload) <= (slo.ttft_s or math.inf)) >= share
    ]
    for wanted in (share, (1 + 2 * share) / 3, (2 + share) / 3):
        enough = partial(_enough_prefill, quick, plenty, rate_rps, wanted)
        sized = [pools for kind in able if (pools := _fewest(kind, enough))]
        for first in sorted(sized, key=usd_per_hour_of)[:PREFILLS_MAX]:
            enough = partial(_enough, quick, first, rate_rps, share)
            for kind in _kinds(WorkerRole.DECODE, offers):
                if second := _fewest(kind, enough):
                    both = (*first, *second)
                    if not shortage(both):
                        yield both


def _enough_prefill(quick: Analytic, plenty: Pool, rate_rps: float, wanted: float, pools: Pools) -> bool:
    return quick((*pools, plenty), rate_rps).ttft >= wanted


def _enough(quick: Analytic, first: Pools, rate_rps: float, share: float, pools: Pools) -> bool:
    return quick((*first, *pools), rate_rps).joint >= share


def _fewest(kind: _Kind, enough: Callable[[Pools], bool]) -> Pools:
    """The smallest pool of a kind that is enough; empty when no number that can be had is."""
    most = REPLICAS_MAX if not shortage(kind.pools(REPLICAS_MAX)) else _most(kind)
    if not most or not enough(kind.pools(most)):
        return ()
    low, high = 0, 1
    while high < most and not enough(kind.pools(high)):
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(kind.pools(middle)) else (middle, high)
    return kind.pools(high)


def _most(kind: _Kind) -> int:
    """As many replicas as can be had."""
    low, high = 0, REPLICAS_MAX
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if shortage(kind.pools(middle)) else (middle, high)
    return low
