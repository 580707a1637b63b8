"""How many requests meet their limits on given pools, in a millisecond: the planner's first pass. Deciding code.

It puts `planner_sides` together: split pools and colocated ones beside each other, replicas that spot markets take away, and
requests that such a death hits. What it leaves out (placement, prefix reuse, bursts that outlast a queue's memory) is what the
simulator is asked for afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from cluster.planner_offers import HOUR_S, Attainment, Market, Offer, Pool, Workload
from cluster.planner_sides import Side, answer_s, decode_side, mixed_side, prefill_side, prompt_s
from core.request import Slo, WorkerRole

_SIDES: dict[WorkerRole, Callable[[Offer, float, float, Workload, Slo], Side]] = {
    WorkerRole.PREFILL: prefill_side,
    WorkerRole.DECODE: decode_side,
    WorkerRole.COLOCATED: mixed_side,
}
ENUMERATED_MAX = 6
"""Spot replicas of a pool whose every number alive is judged; of more, the mean number."""
SERVERS_MIN = 0.05
"""All taken away at once: judged as so little that nothing is in time."""


class Analytic:
    """Judges pools under one workload and its limits."""

    def __init__(self, workload: Workload, slo: Slo) -> None:
        self._work = workload
        self._slo = slo
        self._known: dict[tuple[WorkerRole, Offer, int, int, float], Side] = {}

    def __call__(self, pools: Sequence[Pool], rate_rps: float) -> Attainment:
        """Split and colocated pools share the rate by what they can bear."""
        bears = {role: self._bears(pools, role) for role in _SIDES}
        split, mixed = min(bears[WorkerRole.PREFILL], bears[WorkerRole.DECODE]), bears[WorkerRole.COLOCATED]
        if split + mixed <= 0:
            return Attainment(0.0, 0.0, 0.0, 0.0)
        parts = []
        for share, roles in ((split, (WorkerRole.PREFILL, WorkerRole.DECODE)), (mixed, (WorkerRole.COLOCATED,))):
            if share > 0:
                rate = rate_rps * share / (split + mixed)
                parts.append((share / (split + mixed), self._of([self._role(pools, role, rate) for role in roles])))
        return Attainment(*(sum(share * each[at] for share, each in parts) for at in range(4)))

    def _of(self, sides: Sequence[Side]) -> Attainment:
        ttft, tbt = np.ones_like(self._work.inputs), np.ones_like(self._work.inputs)
        for side in sides:
            ttft, tbt = ttft * side.ttft, tbt * side.tbt
        held = min(side.held for side in sides)
        return Attainment(held * float(np.mean(ttft * tbt)), float(np.mean(ttft)), float(np.mean(tbt)), held)

    def _role(self, pools: Sequence[Pool], role: WorkerRole, rate_rps: float) -> Side:
        """Offers of one role share its rate by what each can bear."""
        counts: dict[Offer, tuple[int, int]] = {}
        for pool in pools:
            if pool.role is role and pool.replicas:
                fixed, spot = counts.get(pool.offer, (0, 0))
                more = (0, pool.replicas) if pool.market is Market.SPOT else (pool.replicas, 0)
                counts[pool.offer] = (fixed + more[0], spot + more[1])
        weights = {offer: (fixed + spot) / self._work_s(offer, role) for offer, (fixed, spot) in counts.items()}
        shares = {offer: weight / sum(weights.values()) for offer, weight in weights.items()}
        return _mean(
            [(shares[offer], self._offer(role, offer, *both, shares[offer] * rate_rps)) for offer, both in counts.items()]
        )

    def _offer(self, role: WorkerRole, offer: Offer, fixed: int, spot: int, rate_rps: float) -> Side:
        """Over the numbers of spot replicas that may be there; a request on one that is taken away misses its limits."""
        key = (role, offer, fixed, spot, rate_rps)
        if key not in self._known:
            ask = _SIDES[role]
            alive = _alive(spot, offer.spot.availability if offer.spot is not None else 1.0)
            side = _mean(
                [
                    (chance, ask(offer, max(SERVERS_MIN, fixed + count), rate_rps, self._work, self._slo))
                    for chance, count in alive
                ]
            )
            if spot and offer.spot is not None:
                hit = 1 - math.exp(-offer.spot.interruptions_per_hour / HOUR_S * side.stay_s)
                side = side._replace(tbt=side.tbt * (1 - hit * spot / (spot + fixed)))
            self._known[key] = side
        return self._known[key]

    def _bears(self, pools: Sequence[Pool], role: WorkerRole) -> float:
        return sum(pool.replicas / self._work_s(pool.offer, role) for pool in pools if pool.role is role)

    def _work_s(self, offer: Offer, role: WorkerRole) -> float:
        """Machine time of a request in that role."""
        prompts = float(np.mean(prompt_s(offer, self._work))) if role is not WorkerRole.DECODE else 0.0
        return max(1e-9, prompts + (answer_s(offer, self._work) if role is not WorkerRole.PREFILL else 0.0))


def _alive(spot: int, availability: float) -> list[tuple[float, float]]:
    """(probability, replicas)."""
    if not spot or availability >= 1:
        return [(1.0, spot)]
    if spot > ENUMERATED_MAX:
        return [(1.0, spot * availability)]
    return [
        (math.comb(spot, count) * availability**count * (1 - availability) ** (spot - count), count)
        for count in range(spot + 1)
    ]


def _mean(weighted: Sequence[tuple[float, Side]]) -> Side:
    ttft = tbt = np.zeros(1)
    held = stay_s = 0.0
    for share, side in weighted:
        ttft, tbt = ttft + share * side.ttft, tbt + share * side.tbt
        held, stay_s = held + share * side.held, stay_s + share * side.stay_s
    return Side(ttft, tbt, held, stay_s)
