"""What to buy: the cheapest pools that serve a demand within its limits, or the most goodput there is. Deciding code.

`plan` looks at every pair of offers for split pools and every offer for colocated ones, on demand, on spot markets and mixed,
and sizes each with a quick judge (`planner_analytic`). The best of each kind are then judged by `evaluate`, which is given (the
simulator with the router in the loop) and mended: one replica more where a limit is missed, one less where none is. The goodput
of what is left over is the highest rate that still attains the limits, for several seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist, fmean, stdev
from typing import Protocol

from cluster.planner_analytic import Analytic
from cluster.planner_offers import Attainment, Offer, Pools, Workload, gpus_of, shortage, usd_per_hour_of
from cluster.planner_sizes import candidates
from core.request import Slo, WorkerRole

PART_MIN = 1e-3
"""Of the demand: machines that serve less of it serve nothing."""
IDLE_RPS = 1e-3
"""Who cannot keep the limits at this rate cannot keep them at all."""
UNPRICED = (math.inf, 0)
MENDS_TYPICAL, GOODPUT_TYPICAL = 2, 5
"""Questions that a finalist and a seed of the goodput take, about: for what is said of the time that is left."""
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t at 97.5 % for 1 to 9 degrees of freedom; the normal quantile beyond."""


class Evaluate(Protocol):
    def __call__(self, pools: Pools, rate_rps: float, seed: int) -> Attainment:
        """Shares of requests that these pools serve within the limits at that rate. The same seed gives the same answer."""
        ...


@dataclass(frozen=True, slots=True)
class Settings:
    """`share`: of requests that must meet both limits. `finalists`: plans that `evaluate` judges; `mends`: changes of one
    replica that it may ask for in each. `seeds`: of the goodput that is reported. `step`: relative, of its search."""

    share: float = 0.9
    finalists: int = 3
    mends: int = 6
    seeds: tuple[int, ...] = (0, 1, 2)
    step: float = 0.05


@dataclass(frozen=True, slots=True)
class Interval:
    mean: float
    low: float
    high: float

    def scaled(self, factor: float) -> Interval:
        return Interval(self.mean * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True, slots=True)
class Plan:
    """`meets`: the demand is served within its limits. `binding`: which limit more load, or fewer replicas, would break first:
    "ttft", "tbt", "memory", or which GPU there are too few of. Intervals hold the mean over seeds with 95 % confidence."""

    pools: Pools
    meets: bool
    binding: str
    goodput_rps: Interval
    attained: Attainment
    gpus: int
    usd_per_hour: float

    @property
    def per_gpu(self) -> Interval:
        return self.goodput_rps.scaled(1 / self.gpus)

    @property
    def per_usd(self) -> Interval | None:
        """Requests within their limits per dollar; None where nothing has a price."""
        return self.goodput_rps.scaled(3600 / self.usd_per_hour) if self.usd_per_hour else None


def plan(
    workload: Workload,
    offers: Sequence[Offer],
    slo: Slo,
    evaluate: Evaluate | None,
    settings: Settings,
    on_step: Callable[[str, int], None] = lambda what, left: None,
) -> Plan | None:
    """None when no offer meets the limits at any rate (`idle_limits` says why). `evaluate` None: the quick judge alone.

    Bounded: finalists · (mends + 1) questions for sizes, and for the goodput of one plan seeds · 2 log2(1 / step); none is
    asked twice. `on_step` hears of each before it is asked: what it is about, and how many there will be, about, with it.
    """
    quick = Analytic(workload, slo)
    judge = _Asked(evaluate or (lambda pools, rate_rps, seed: quick(pools, rate_rps)), settings, on_step)
    rate_rps = workload.rate_rps
    scale, found = _sized(workload, offers, slo, quick, settings)
    if not found:
        return None
    mended: list[tuple[Pools, Attainment]] = []
    serving: list[Pools] = []
    for left, pools in zip(range(len(found), 0, -1), found, strict=True):
        judge.expect(MENDS_TYPICAL * left, len(settings.seeds))
        below = min(map(_price, serving), default=UNPRICED) if scale >= 1 else UNPRICED
        if begin := _cheaper(pools, below, quick, scale * rate_rps):
            mended.append(_mend(begin, below, scale * rate_rps, judge, settings))
            serving += [each for each, attained in mended[-1:] if attained.joint >= settings.share]
    if scale >= 1 and serving:
        best = min(serving, key=_price)
    else:
        best = max(mended, key=lambda one: (one[1].joint, -usd_per_hour_of(one[0])))[0]
    reached: list[int | None] = []
    for left, seed in zip(range(len(settings.seeds), 0, -1), settings.seeds, strict=True):
        judge.expect(0, left)
        known = next((at for at in reached if at is not None), 0)
        reached.append(_goodput_at(best, scale * rate_rps, known, judge, settings, seed))
    interval = interval_of([0.0 if at is None else scale * rate_rps * (1 + settings.step) ** at for at in reached])
    attained = judge(best, rate_rps, settings.seeds[0])
    meets = scale >= 1 and bool(serving)
    beyond = judge(best, max(interval.mean * 1.1, 1e-9), settings.seeds[0])
    binding = beyond.worst if meets else _short(best) or attained.worst
    return Plan(best, meets, binding, interval, attained, gpus_of(best), usd_per_hour_of(best))


class _Asked:
    """Asks once and remembers; tells of what it asks, and about how much there is still to ask."""

    def __init__(self, evaluate: Evaluate, settings: Settings, on_step: Callable[[str, int], None]) -> None:
        self._evaluate, self._on_step = evaluate, on_step
        self._known: dict[tuple[Pools, float, int], Attainment] = {}
        self._left = 0

    def expect(self, mends: int, seeds: int) -> None:
        """So many more questions of sizes, and seeds whose goodput is to be found."""
        self._left = mends + GOODPUT_TYPICAL * seeds + 1  # one of what lies beyond

    def __call__(self, pools: Pools, rate_rps: float, seed: int) -> Attainment:
        asked = pools, rate_rps, seed
        found = self._known.get(asked)
        if found is None:
            self._on_step(f"{_named(pools)} at {rate_rps:.3g}/s, part {seed}", self._left)
            found = self._known[asked] = self._evaluate(pools, rate_rps, seed)
            self._left = max(self._left - 1, 1)
        return found


def _sized(
    workload: Workload, offers: Sequence[Offer], slo: Slo, quick: Analytic, settings: Settings
) -> tuple[float, list[Pools]]:
    """Candidates for the demand or, where the machines there are do not serve it, for the part of it that they do."""

    def at(scale: float) -> list[Pools]:
        rate_rps = scale * workload.rate_rps
        return candidates(workload, offers, slo, quick, rate_rps, settings.share, settings.finalists)

    if found := at(1.0):
        return 1.0, found
    low, high = PART_MIN, 1.0
    if not (found := at(low)):
        low = min(low, IDLE_RPS / workload.rate_rps)  # a demand far beyond all machines, or limits that nothing keeps
        if not (found := at(low)):
            return 0.0, []
    while high > 1.1 * low:
        middle = math.sqrt(low * high)
        if better := at(middle):
            low, found = middle, better
        else:
            high = middle
    return low, found


def interval_of(values: Sequence[float]) -> Interval:
    """Student's interval of the mean; as wide as nothing for a single value."""
    mean = fmean(values)
    if len(values) < 2:
        return Interval(mean, mean, mean)
    free = len(values) - 1
    quantile = T_975[free - 1] if free <= len(T_975) else NormalDist().inv_cdf(0.975)
    half = quantile * stdev(values) / math.sqrt(len(values))
    return Interval(mean, max(0.0, mean - half), mean + half)


def _price(pools: Pools) -> tuple[float, int]:
    return usd_per_hour_of(pools), gpus_of(pools)


def _cheaper(pools: Pools, below: tuple[float, int], quick: Analytic, rate_rps: float) -> Pools:
    """Without the replicas, those that the quick judge misses least, that make it as dear as what was found already, or dearer;
    empty when it cannot be cheaper. What cannot win need not be judged."""
    while pools and _price(pools) >= below:
        pools = max(_fewer(pools), key=lambda fewer: quick(fewer, rate_rps).joint, default=())
    return pools


def _mend(
    pools: Pools, below: tuple[float, int], rate_rps: float, judge: Evaluate, settings: Settings
) -> tuple[Pools, Attainment]:
    """One replica more where the worst limit is missed, as long as it stays cheaper than `below`; one less while the limits are
    met; the smallest that meets them."""
    attained = judge(pools, rate_rps, settings.seeds[0])
    best: tuple[Pools, Attainment] = (pools, attained)
    for _ in range(settings.mends):
        met = best[1].joint >= settings.share
        options = _fewer(best[0]) if met else [_more(best[0], best[1].worst)]
        better: tuple[Pools, Attainment] | None = None
        for option in options:
            if shortage(option) or _price(option) >= below:
                continue
            tried = judge(option, rate_rps, settings.seeds[0])
            if tried.joint >= settings.share if met else tried.joint > best[1].joint:
                better = (option, tried)
                break
        if better is None:
            break
        best = better
    return best


def _more(pools: Pools, worst: str) -> Pools:
    """One replica more of the role that the limit is about, in its dearer, steadier market."""
    wanted = {"ttft": WorkerRole.PREFILL, "tbt": WorkerRole.DECODE, "memory": WorkerRole.DECODE}[worst]
    roles = {wanted, WorkerRole.COLOCATED}
    at = max((at for at, pool in enumerate(pools) if pool.role in roles), key=lambda at: pools[at].terms.usd_per_hour)
    return _changed(pools, at, 1)


def _fewer(pools: Pools) -> list[Pools]:
    """Without one replica, the dearest first; every role that serves keeps one."""
    counts = {role: sum(p.replicas for p in pools if p.role is role) for role in WorkerRole}
    at_most = [at for at, pool in enumerate(pools) if counts[pool.role] > 1]
    at_most.sort(key=lambda at: -pools[at].terms.usd_per_hour * pools[at].offer.layout.gpus)
    return [_changed(pools, at, -1) for at in at_most]


def _changed(pools: Pools, at: int, by: int) -> Pools:
    changed = (*pools[:at], replace(pools[at], replicas=pools[at].replicas + by), *pools[at + 1 :])
    return tuple(pool for pool in changed if pool.replicas)


def _goodput_at(pools: Pools, rate_rps: float, begin: int, judge: Evaluate, settings: Settings, seed: int) -> int | None:
    """The highest rate that attains the limits, as the number of steps above the demand of `rate_rps`; None when that is less
    than a 64th of it. No more than 16 times the demand is tried. Looked for from `begin` on: away from it in growing strides,
    then halved in between, so that the beginning changes the effort alone.
    """
    lowest, highest = (round(math.log(bound, 1 + settings.step)) for bound in (1 / 64, 16))

    def met(at: int) -> bool:
        return judge(pools, rate_rps * (1 + settings.step) ** at, seed).joint >= settings.share

    low, high, stride = begin, begin, 2
    if met(begin):
        while low == high < highest:
            high = min(low + stride, highest)
            low, stride = high if met(high) else low, 2 * stride
    else:
        while low == high:
            if high <= lowest:
                return None
            low = max(high - stride, lowest)
            high, stride = high if met(low) else low, 2 * stride
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if met(middle) else (low, middle)
    return low


def _short(pools: Pools) -> str:
    """The GPU of which one replica more cannot be had."""
    for at in range(len(pools)):
        if missing := shortage(_changed(pools, at, 1)):
            return missing
    return ""


def _named(pools: Pools) -> str:
    return ", ".join(f"{pool.replicas} {pool.role.value} on {pool.offer}" for pool in pools)
