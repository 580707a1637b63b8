"""What a user felt of each request, and what a run of them adds up to: percentiles, attainment, goodput. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from core.request import Slo
from core.tally import Outcome, Tally, percentile, spread

__all__ = ["Outcome", "RequestTrace", "percentile", "rate_at", "spread", "summarize"]


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


def summarize(traces: Sequence[RequestTrace], slo: Slo, duration_s: float) -> dict[str, Any]:
    """The report of a run, as `core.tally` defines it; percentiles of gaps are exact here."""
    tally = Tally()
    gaps: list[float] = []
    for trace in traces:
        ended_s = trace.end_s - trace.start_s
        tally.add(trace.outcome, slo, trace.ttft_s, trace.tbt_s, trace.tpot_s, ended_s, len(trace.token_s))
        if trace.outcome is Outcome.COMPLETED:
            gaps += trace.gaps_s
    return tally.report(duration_s) | {"itl_s": spread(gaps)}


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
