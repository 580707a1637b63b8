"""Goodput as it happens: which requests of a class met all limits, missed one, or were turned away. Deciding code.

TTFT counts from the router accepting the request. TBT is the mean of a request's slowest ⌈10 %⌉ of token gaps, tokens that
came together having none between them: the definitions of docs and of `tandem bench`, measured at the router.
"""

from __future__ import annotations

import heapq
import math
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from core.histogram import Histogram
from core.request import Slo
from router.frontend_types import Timing
from tandem.errors import CancelledError, OverloadedError, TandemError

CLASS_UNNAMED = "standard"
LIMITS = ("ttft", "tbt", "tpot")
PARTS = ("queue", "prefill", "handoff_wait", "transfer", "first_decode")
PART_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.35, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_SLOWEST_SHARE = 10


class Gaps:
    """Token gaps of one choice, eight bytes each; as many as it may have tokens."""

    def __init__(self) -> None:
        self._gaps_s = array("d")
        self._count = 0

    def add(self, gap_s: float, tokens: int) -> None:
        """`tokens` came at once, `gap_s` after the one before."""
        self._gaps_s.append(gap_s)
        self._count += tokens

    def joined(self, tokens: int) -> None:
        """So many more came together with the first token."""
        self._count += tokens

    @property
    def tbt_s(self) -> float | None:
        """None for a choice without a gap, which has met any limit."""
        if not self._count:
            return None
        slowest = math.ceil(self._count / _SLOWEST_SHARE)
        return math.fsum(heapq.nlargest(slowest, self._gaps_s)) / slowest

    @property
    def tpot_s(self) -> float | None:
        return math.fsum(self._gaps_s) / self._count if self._count else None


@dataclass(frozen=True, slots=True)
class Felt:
    """What a user felt of a request: of several choices the slowest gaps. None where there was nothing to measure."""

    ttft_s: float | None
    tbt_s: float | None
    tpot_s: float | None

    @staticmethod
    def of(ttft_s: float | None, choices: Sequence[Gaps]) -> Felt:
        tbt_s = [gaps.tbt_s for gaps in choices if gaps.tbt_s is not None]
        tpot_s = [gaps.tpot_s for gaps in choices if gaps.tpot_s is not None]
        return Felt(ttft_s, max(tbt_s, default=None), max(tpot_s, default=None))

    def missed(self, slo: Slo) -> tuple[str, ...]:
        """The names of the limits that were missed."""
        pairs = zip(LIMITS, (self.ttft_s, self.tbt_s, self.tpot_s), (slo.ttft_s, slo.tbt_s, slo.tpot_s), strict=True)
        return tuple(name for name, felt_s, limit_s in pairs if limit_s is not None and felt_s is not None and felt_s > limit_s)


class Attainment:
    """Plain counters. Each request that could be served is counted once in `outcomes`, by (class, outcome): `met`,
    `ttft_missed`, `tbt_missed`, `tpot_missed` (the first of several), `rejected`, `failed`, `cancelled`; each limit that a
    completed one missed once in `violations`, by (class, limit). Classes come from the configuration, so they are few.
    """

    def __init__(self) -> None:
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.violations: Counter[tuple[str, str]] = Counter()
        self.parts = {part: Histogram(PART_SECONDS) for part in PARTS}

    def completed(self, slo_class: str, slo: Slo, felt: Felt) -> None:
        name, missed = slo_class or CLASS_UNNAMED, felt.missed(slo)
        self.outcomes[name, f"{missed[0]}_missed" if missed else "met"] += 1
        for limit in LIMITS:  # a rate can only be taken of a counter that began at 0
            self.violations[name, limit] += limit in missed

    def cancelled(self, slo_class: str) -> None:
        """By its user: nobody's miss."""
        self.outcomes[slo_class or CLASS_UNNAMED, "cancelled"] += 1

    def failed(self, slo_class: str, error: TandemError) -> None:
        """Refused for want of room or of a chance to meet its limits, or ended by an error; what the caller got wrong is not
        counted."""
        if isinstance(error, OverloadedError):
            outcome = "rejected"
        elif isinstance(error, CancelledError):
            outcome = "cancelled"
        elif error.http_status < 500:
            return
        else:
            outcome = "failed"
        self.outcomes[slo_class or CLASS_UNNAMED, outcome] += 1

    def spent(self, timing: Timing, *, split: bool) -> None:
        """Where the time of a completed request went; parts that only a hand-off has are counted of hand-offs alone."""
        self.parts["queue"].observe(timing.queue_s)
        self.parts["prefill"].observe(timing.prefill_s)
        if split:
            self.parts["handoff_wait"].observe(timing.handoff_wait_s)
            self.parts["transfer"].observe(timing.transfer_s)
        if timing.first_decode_s > 0:
            self.parts["first_decode"].observe(timing.first_decode_s)
