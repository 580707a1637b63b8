"""A run of requests added up one by one: percentiles, attainment, goodput. It keeps four numbers of a request.

Pure. `tandem bench` and `tandem sim` report in this shape.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import Any

from core.request import Slo

PERCENTILES = (50, 90, 99)
GAP_STEP = 1.002
"""Gaps between tokens, of which there are hundreds of millions, are counted in classes of this ratio: their percentiles are
true to a thousandth."""
_LOG_STEP = math.log(GAP_STEP)


class Outcome(Enum):
    COMPLETED = "completed"
    REJECTED = "rejected"  # refused at once: overload, admission
    FAILED = "failed"


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest ranks of sorted, non-empty `values`."""
    place = (len(values) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (place - low)


def spread(values: Iterable[float]) -> dict[str, float | None]:
    """`{"p50", "p90", "p99", "mean"}`; all None when there is nothing to measure."""
    ordered = sorted(values)
    if not ordered:
        return {**{f"p{p}": None for p in PERCENTILES}, "mean": None}
    return {**{f"p{p}": percentile(ordered, p) for p in PERCENTILES}, "mean": math.fsum(ordered) / len(ordered)}


class Gaps:
    """Gaps between tokens, counted by size."""

    def __init__(self) -> None:
        self.count = 0
        self._sum_s = 0.0
        self._sizes: Counter[int] = Counter()
        self._zeros = 0

    def add(self, gap_s: float, times: int = 1) -> None:
        self.count += times
        self._sum_s += gap_s * times
        if gap_s > 0:
            self._sizes[math.floor(math.log(gap_s) / _LOG_STEP)] += times
        else:
            self._zeros += times

    def spread(self) -> dict[str, float | None]:
        if not self.count:
            return spread(())
        return {**{f"p{p}": self._rank(p) for p in PERCENTILES}, "mean": self._sum_s / self.count}

    def _rank(self, percent: float) -> float:
        left = (self.count - 1) * percent / 100 - self._zeros
        if left < 0:
            return 0.0
        for size in sorted(self._sizes):
            left -= self._sizes[size]
            if left < 0:
                return float(GAP_STEP ** (size + 0.5))
        return float(GAP_STEP ** (max(self._sizes) + 0.5))


class Tally:
    """`add` each request once. A limit that a request has not got, and one for which there was nothing to measure, is met."""

    def __init__(self) -> None:
        self.outcomes: Counter[Outcome] = Counter()
        self.gaps = Gaps()
        self.output_tokens = 0
        self._met: Counter[str] = Counter(dict.fromkeys(("ttft", "tbt", "tpot", "joint", "joint_mean"), 0))
        self._columns = {name: array("d") for name in ("ttft_s", "tpot_s", "tbt_s", "e2e_s")}

    @property
    def requests(self) -> int:
        return sum(self.outcomes.values())

    def met(self, limits: str) -> int:
        """How many requests met `ttft`, `tbt`, `tpot`, `joint` or `joint_mean` so far."""
        return self._met[limits]

    def add(
        self,
        outcome: Outcome,
        slo: Slo,
        ttft_s: float | None = None,
        tbt_s: float | None = None,
        tpot_s: float | None = None,
        e2e_s: float = 0.0,
        tokens: int = 0,
    ) -> bool:
        """Whether it met its TTFT and TBT limits. Gaps are added apart; `tokens` count whatever the outcome."""
        self.outcomes[outcome] += 1
        self.output_tokens += tokens
        if outcome is not Outcome.COMPLETED:
            return False
        columns = self._columns
        for name, value in (("ttft_s", ttft_s), ("tbt_s", tbt_s), ("tpot_s", tpot_s), ("e2e_s", e2e_s)):
            if value is not None:
                columns[name].append(value)
        ttft = _within(ttft_s, slo.ttft_s)
        tbt, tpot = _within(tbt_s, slo.tbt_s), _within(tpot_s, slo.tpot_s)
        met = self._met
        met["ttft"] += ttft
        met["tbt"] += tbt
        met["tpot"] += tpot
        met["joint"] += ttft and tbt
        met["joint_mean"] += ttft and tpot
        return ttft and tbt

    def report(self, duration_s: float) -> dict[str, Any]:
        """Attainment counts rejected and failed requests as missed; `joint` needs TTFT and TBT within limits, `joint_mean` TTFT
        and the mean TPOT; goodput is requests per second that met them."""
        requests, met, columns = self.requests, self._met, self._columns
        per_s = 1 / duration_s if duration_s > 0 else 0.0
        return {
            "requests": requests,
            "completed": self.outcomes[Outcome.COMPLETED],
            "rejected": self.outcomes[Outcome.REJECTED],
            "failed": self.outcomes[Outcome.FAILED],
            "duration_s": duration_s,
            "ttft_s": spread(columns["ttft_s"]),
            "tpot_s": spread(columns["tpot_s"]),
            "tbt_s": spread(columns["tbt_s"]),
            "itl_s": self.gaps.spread(),
            "e2e_s": spread(columns["e2e_s"]),
            "attainment": {name: count / requests if requests else 0.0 for name, count in met.items()},
            "goodput_rps": met["joint"] * per_s,
            "goodput_mean_rps": met["joint_mean"] * per_s,
            "output_tokens_per_s": self.output_tokens * per_s,
        }

    def check(self) -> None:
        """Asserts that goodput adds up: what met a limit was completed, and both limits are met no more often than either."""
        met, done = self._met, self.outcomes[Outcome.COMPLETED]
        assert max(met.values()) <= done <= self.requests, "more requests met a limit than were completed"
        assert met["joint"] <= min(met["ttft"], met["tbt"]), "both limits were met more often than one of them"
        assert met["joint"] >= met["ttft"] + met["tbt"] - done, "a request that met both limits was not counted"
        assert met["joint_mean"] <= min(met["ttft"], met["tpot"]), "both limits were met more often than one of them"


def _within(value_s: float | None, limit_s: float | None) -> bool:
    return limit_s is None or value_s is None or value_s <= limit_s
