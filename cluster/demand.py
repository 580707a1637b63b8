"""How many workers each pool will want, from what routers were asked for: arrivals per second and lengths are forecast, and the
planner's closed forms (`planner_sides`) say how many workers serve that within the limits. Deciding code.

Only what routers report is known: means and spreads of lengths, not their shape, so lengths are taken to be lognormal and
arrivals to be Poisson; bursts are in the head-room of the forecast rate. Prompt tokens that were cached are not computed, but
held. What a worker can do is what one of its kind says that its steps cost.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from cluster.forecast import Forecast
from cluster.planner_model import Layout
from cluster.planner_offers import Floats, Offer, Workload
from cluster.planner_sides import Side, decode_side, mixed_side, prefill_side
from core.cost_model import CostModel, LinkCost
from core.report import Demand, WorkerReport, WorkerState
from core.request import Slo, WorkerRole

WINDOW_S = 2.0
"""Of one sample of the rate and of lengths."""
POINTS = 48
"""Requests that stand for a distribution of lengths."""
SHARE = 0.9
"""Of requests that must be within both limits."""
LINK = LinkCost(0.002, 1e9)
"""Between workers, where nobody said: `kvtransfer.link_costs.ASSUMED`."""
ROUTERS_KEPT = 256
"""Incarnations whose last counts are remembered."""
IDLE = 1e-3
"""Of the rate that is expected: hardly any load."""
NEAR_BEST = 0.99
"""Of what any number of workers reaches: more of them than that takes are of no use."""


class Expected(NamedTuple):
    """Of the time ahead. `cached`: share of prompt tokens that need not be computed."""

    rate_rps: float
    prompt_tokens: float
    prompt_cv: float
    answer_tokens: float
    answer_cv: float
    cached: float

    def __str__(self) -> str:
        return f"{self.rate_rps:.2f} requests/s of {self.prompt_tokens:.0f} + {self.answer_tokens:.0f} tokens are expected"


class DemandForecast:
    """Over all routers, whose counts begin anew when they are replaced."""

    def __init__(self) -> None:
        self._rate = Forecast()
        self._means = {name: Forecast() for name in ("prompt", "prompt2", "answer", "answer2", "cached")}
        self._last: dict[tuple[str, int], Demand] = {}
        self._since: float | None = None
        self._gathered = Demand()

    def observe(self, reports: Iterable[WorkerReport], now: float) -> bool:
        """True when there is a new sample."""
        for report in reports:
            if report.demand is not None and report.role is WorkerRole.ROUTER:
                name = report.worker_id, report.epoch
                before = self._last.get(name, report.demand if self._since is None else Demand())
                self._last[name] = report.demand
                self._gathered = _plus(self._gathered, report.demand, before)
        for name in [*self._last][:-ROUTERS_KEPT]:
            del self._last[name]
        if self._since is None:
            self._since = now
        if (passed_s := now - self._since) < WINDOW_S:
            return False
        seen, self._gathered, self._since = self._gathered, Demand(), now
        self._rate.observe(seen.requests / passed_s, now)
        if seen.answered:
            means = (seen.prompt_tokens, seen.prompt_squares, seen.answer_tokens, seen.answer_squares)
            for series, total in zip(self._means.values(), means, strict=False):
                series.observe(total / seen.answered, now)
            self._means["cached"].observe(min(1.0, seen.cached_tokens / max(1, seen.prompt_tokens)), now)
        return True

    def expected(self, horizon_s: float) -> Expected | None:
        """With head-room for the rate; None until requests have been answered."""
        prompt, prompt2, answer, answer2, cached = (series.level for series in self._means.values())
        if prompt <= 0 or answer <= 0:
            return None
        rate = self._rate.upper(horizon_s)
        return Expected(rate, prompt, _cv(prompt, prompt2), answer, _cv(answer, answer2), min(cached, 0.99))


def _plus(total: Demand, new: Demand, before: Demand) -> Demand:
    return Demand._make(known + after - then for known, after, then in zip(total, new, before, strict=True))


def _cv(mean: float, square: float) -> float:
    return math.sqrt(max(0.0, square / mean**2 - 1))


def lognormal(mean: float, cv: float) -> Floats:
    """POINTS lengths with that mean and, nearly, that coefficient of variation, ascending, at least one token each."""
    sigma = math.sqrt(math.log1p(cv**2))
    normal = NormalDist()
    drawn = np.exp(sigma * np.array([normal.inv_cdf((n + 0.5) / POINTS) for n in range(POINTS)]))
    return np.asarray(np.maximum(drawn * mean / drawn.mean(), 1.0))


def workload_of(expected: Expected, computed: bool) -> Workload:
    """`computed`: prompts without what is cached of them. Lengths of prompts and answers are taken as independent."""
    prompt = expected.prompt_tokens * (1 - expected.cached if computed else 1.0)
    answers = lognormal(expected.answer_tokens, expected.answer_cv)
    order = np.argsort([n * 29 % POINTS for n in range(POINTS)])  # 29 and 48 have no common factor: every answer once
    return Workload(lognormal(prompt, expected.prompt_cv), answers[order], expected.rate_rps, 1.0)


@dataclass(frozen=True, slots=True)
class Terms:
    """What pools are planned for. `step_tokens`: of one step of a worker that computes prompts."""

    slo: Slo
    step_tokens: int
    most: int


class DemandPlanner:
    """Asked with every report there is; plans when there is something new."""

    def __init__(self, terms: Terms) -> None:
        self.said = ""
        """What the last plan is for, for the log."""
        self._terms = terms
        self._forecast = DemandForecast()
        self._planned: dict[WorkerRole, int] = {}

    def planned(
        self, reports: Sequence[WorkerReport], desired: Mapping[WorkerRole, int], horizon_s: float, now: float
    ) -> Mapping[WorkerRole, int]:
        """Workers that each pool wants, of the roles that are desired; a role is left out while too little is known of it."""
        if self._forecast.observe(reports, now):
            expected = self._forecast.expected(horizon_s)
            self.said = str(expected) if expected is not None else ""
            self._planned = self._plan(reports, desired, expected) if expected is not None else {}
        return self._planned

    def _plan(
        self, reports: Sequence[WorkerReport], desired: Mapping[WorkerRole, int], expected: Expected
    ) -> dict[WorkerRole, int]:
        found = {}
        colocated = desired.get(WorkerRole.COLOCATED, 0)
        split = min(desired.get(WorkerRole.PREFILL, 0), desired.get(WorkerRole.DECODE, 0))
        for role in (WorkerRole.PREFILL, WorkerRole.DECODE, WorkerRole.COLOCATED):
            offer = _offer(reports, role, self._terms.step_tokens)
            if offer is None or not desired.get(role):
                continue
            part = (colocated if role is WorkerRole.COLOCATED else split) / (colocated + split)
            found[role] = workers_for(role, offer, expected, part * expected.rate_rps, self._terms)
        return found


def workers_for(role: WorkerRole, offer: Offer, expected: Expected, rate_rps: float, terms: Terms) -> int:
    """The fewest that serve so many requests a second within the limits; where not even `most` do, the fewest that are about as
    good as those. 0 where a limit is missed without any load: no number of workers mends that."""
    work = workload_of(expected, computed=role is not WorkerRole.DECODE)
    share = SHARE if role is WorkerRole.COLOCATED else math.sqrt(SHARE)  # two pools, each may miss

    def attained(count: int, load: float = 1.0) -> float:
        side = _side(role, offer, count, load * rate_rps, work, terms.slo)
        return side.held * float(np.mean(side.ttft * side.tbt))

    wanted = min(share, NEAR_BEST * attained(terms.most))
    if wanted <= 0:
        return terms.most if attained(terms.most, IDLE) > 0 else 0
    return next((count for count in range(1, terms.most) if attained(count) >= wanted), terms.most)


def _side(role: WorkerRole, offer: Offer, servers: float, rate_rps: float, work: Workload, slo: Slo) -> Side:
    if role is WorkerRole.PREFILL:
        return prefill_side(offer, servers, rate_rps, work, slo)
    return (decode_side if role is WorkerRole.DECODE else mixed_side)(offer, servers, rate_rps, work, slo)


def _offer(reports: Iterable[WorkerReport], role: WorkerRole, step_tokens: int) -> Offer | None:
    """A worker of that role as the one says it that has seen most steps; None while none knows what they cost."""
    ready = [one for one in reports if one.role is role and one.state is WorkerState.READY]
    known = [(one.step_cost, one.layout, one) for one in ready if one.step_cost is not None and one.layout is not None]
    if not known:
        return None
    fit, layout, best = max(known, key=lambda one: one[0].samples)
    tokens = best.blocks.total * layout.block_size
    cost = CostModel(fit.cost, layout.token_bytes)
    return Offer(best.node, Layout(1, 1), cost, tokens, LINK, None, step_tokens=step_tokens)
