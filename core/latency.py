"""What a user felt of each request, and what a run of them adds up to: percentiles, attainment, goodput. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from core.request import Slo

PERCENTILES = (50, 90, 99)


class Outcome(Enum):
    COMPLETED = "completed"
    REJECTED = "rejected"  # refused at once: overload, admission
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class RequestTrace:
    """One request as its client saw it; times in seconds on one clock.

    `start_s` is when it was due, not when it was sent: a client that falls behind must not hide the wait (coordinated
    omission). `token_s` holds the arrival of every token.
    """

    start_s: float
    end_s: float
    outcome: Outcome
    token_s: tuple[float, ...] = ()
    error: str = ""

    @property
    def ttft_s(self) -> float | None:
        return self.token_s[0] - self.start_s if self.token_s else None

    @property
    def gaps_s(self) -> tuple[float, ...]:
        return tuple(later - earlier for earlier, later in zip(self.token_s, self.token_s[1:], strict=False))

    @property
    def tpot_s(self) -> float | None:
        """Mean gap; None for a request with no gap."""
        gaps = len(self.token_s) - 1
        return (self.token_s[-1] - self.token_s[0]) / gaps if gaps > 0 else None

    @property
    def tbt_s(self) -> float | None:
        """Mean of the slowest ⌈10 %⌉ of gaps; None for a request with no gap, which has met any limit."""
        gaps = sorted(self.gaps_s, reverse=True)
        slowest = gaps[: math.ceil(len(gaps) / 10)]
        return sum(slowest) / len(slowest) if slowest else None

    def met(self, limit_s: float | None, value_s: float | None) -> bool:
        """Completed and, where there is a limit and something to measure, within it."""
        if self.outcome is not Outcome.COMPLETED:
            return False
        return limit_s is None or value_s is None or value_s <= limit_s


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest ranks of sorted, non-empty `values`."""
    place = (len(values) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (place - low)


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """`{"p50", "p90", "p99", "mean"}`; all None when there is nothing to measure."""
    ordered = sorted(values)
    if not ordered:
        return {**{f"p{p}": None for p in PERCENTILES}, "mean": None}
    return {**{f"p{p}": percentile(ordered, p) for p in PERCENTILES}, "mean": math.fsum(ordered) / len(ordered)}


def summarize(traces: Sequence[RequestTrace], slo: Slo, duration_s: float) -> dict[str, Any]:
    """The report of a run. Attainment counts rejected and failed requests as missed; `joint` needs TTFT and TBT within
    limits, `joint_mean` TTFT and the mean TPOT; goodput is requests per second that met them."""
    done = [trace for trace in traces if trace.outcome is Outcome.COMPLETED]
    ttft = [t.met(slo.ttft_s, t.ttft_s) for t in traces]
    tbt = [t.met(slo.tbt_s, t.tbt_s) for t in traces]
    tpot = [t.met(slo.tpot_s, t.tpot_s) for t in traces]
    joint = [a and b for a, b in zip(ttft, tbt, strict=True)]
    joint_mean = [a and b for a, b in zip(ttft, tpot, strict=True)]
    return {
        "requests": len(traces),
        "completed": len(done),
        "rejected": sum(t.outcome is Outcome.REJECTED for t in traces),
        "failed": sum(t.outcome is Outcome.FAILED for t in traces),
        "duration_s": duration_s,
        "ttft_s": spread([t.ttft_s for t in done if t.ttft_s is not None]),
        "tpot_s": spread([t.tpot_s for t in done if t.tpot_s is not None]),
        "tbt_s": spread([t.tbt_s for t in done if t.tbt_s is not None]),
        "itl_s": spread([gap for t in done for gap in t.gaps_s]),
        "e2e_s": spread([t.end_s - t.start_s for t in done]),
        "attainment": {
            "ttft": _share(ttft),
            "tbt": _share(tbt),
            "tpot": _share(tpot),
            "joint": _share(joint),
            "joint_mean": _share(joint_mean),
        },
        "goodput_rps": sum(joint) / duration_s if duration_s > 0 else 0.0,
        "goodput_mean_rps": sum(joint_mean) / duration_s if duration_s > 0 else 0.0,
        "output_tokens_per_s": sum(len(t.token_s) for t in traces) / duration_s if duration_s > 0 else 0.0,
    }


def rate_at(points: Sequence[tuple[float, float]], share: float = 0.9) -> float | None:
    """The rate up to which `share` is attained, of (rate, attainment) measured at several: between the last point that
    attains it and the first that does not, linear in the logarithm of the rate. None when the lowest rate already does not;
    the highest rate when all do.
    """
    last: tuple[float, float] | None = None
    for rate, attained in sorted(points):
        if attained < share:
            if last is None:
                return None
            low, before = last
            return low * float((rate / low) ** ((before - share) / (before - attained)))
        last = (rate, attained)
    return last[0] if last else None


def _share(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits) if hits else 0.0
