"""Whether a request will keep its limits, by what is predicted for the time its prefill would end. Deciding code.

The load that counts for its token gaps is not today's: those that will have ended by then are taken off (Mooncake, early
rejection based on prediction: section 7.4 of the arXiv paper; here by worker and request, with predicted answer lengths).
"""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections.abc import Callable
from dataclasses import dataclass

from core.errors import SloUnattainableError
from router.attempt import JourneySpec
from router.baselines import matched_tokens
from router.policy import Candidate, Need, Pair
from router.queue import bounded_retry_s
from router.situation import Situation

LOOK_AGAIN_S = 0.5
"""How often a request that is held looks again, beside whenever a place comes free."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """It cannot keep its limits, and waiting would not help."""

    reason: str
    retry_after_s: float

    def error(self) -> SloUnattainableError:
        text = f"refused because {self.reason} (router.admission); retry later, with wider limits or in another slo_class"
        return SloUnattainableError(text, retry_after_s=self.retry_after_s)


@dataclass(frozen=True, slots=True)
class Hold:
    """It waits although there is a place; looks again at `look_at` at the latest."""

    reason: str
    look_at: float


class Departures:
    """When the requests that run on each worker are expected to end. O(log n) to look, n running on one worker."""

    def __init__(self) -> None:
        self._ends: dict[str, list[float]] = {}
        self._of: dict[str, tuple[str, float]] = {}

    def expect(self, request_id: str, worker: str, at: float) -> None:
        """The request goes to this worker, and is expected to end then."""
        self.gone(request_id)
        self._of[request_id] = (worker, at)
        insort(self._ends.setdefault(worker, []), at)

    def gone(self, request_id: str) -> None:
        """It has ended, or runs elsewhere. Idempotent."""
        worker, at = self._of.pop(request_id, ("", 0.0))
        if worker:
            ends = self._ends[worker]
            del ends[bisect_right(ends, at) - 1]
            if not ends:
                del self._ends[worker]

    def between(self, worker: str, now: float, until: float) -> int:
        """How many end until then; of those that were to have ended already nothing is known any more."""
        ends = self._ends.get(worker, [])
        return max(bisect_right(ends, until) - bisect_right(ends, now), 0)


def first_token_limit_s(spec: JourneySpec) -> float:
    """From arrival; infinity when there is none. After its deadline nobody wants a first token either."""
    return min(limit_s if limit_s is not None else math.inf for limit_s in (spec.slo.ttft_s, spec.deadline_s))


def judge(
    now: float, arrived_at: float, spec: JourneySpec, predicted: Candidate, relief_s: Callable[[float], float]
) -> Refusal | Hold | None:
    """None: it will keep its limits. `relief_s(t)`: how much shorter gaps will be at `t`, because others have ended."""
    slo, limit_s = spec.slo, first_token_limit_s(spec)
    ttft_s = now - arrived_at + predicted.ttft_s
    slack_s = limit_s - ttft_s
    if slack_s < 0:
        text = f"its first token would take {ttft_s:.3g} s in all, the limit is {limit_s:g} s"
        return Refusal(text, bounded_retry_s(-slack_s))
    prefilled_at = now + predicted.ttft_s
    for name, gap_s, gap_limit_s in (("slowest tenth", predicted.gap_s, slo.tbt_s), ("mean", predicted.tpot_s, slo.tpot_s)):
        if gap_limit_s is None or gap_s - relief_s(prefilled_at) <= gap_limit_s:
            continue
        text = f"the {name} of its token gaps would be {gap_s - relief_s(prefilled_at):.3g} s, the limit is {gap_limit_s:g} s"
        if gap_s - relief_s(prefilled_at + slack_s) > gap_limit_s:
            return Refusal(text, bounded_retry_s(0.0))
        return Hold(text, now + min(slack_s, LOOK_AGAIN_S))
    return None


def relief_by_request_s(situation: Situation, pair: Pair) -> float:
    """What one request less that runs on the pair's decode worker takes off its gaps."""
    for pool in (situation.decode, situation.whole):
        row = pool.row.get(pair.decode)
        if row is not None:
            context = pool.context[row] / max(pool.running[row], 1.0)
            return float(pool.cost.decode_row_s[row] + pool.cost.decode_context_s[row] * context)
    return 0.0


def quickest_s(situation: Situation, need: Need) -> tuple[float, float]:
    """The prompt and the tokens after it on the quickest workers, with nobody else there; 0 where there are none."""
    prefills = []
    for pool in (situation.prefill, situation.whole):
        if len(pool):
            cached = matched_tokens(situation, pool, need)
            prefills.append(float(pool.prefill_s(need.tokens - cached, cached).min()))
    pools = [pool for pool in (situation.decode, situation.whole) if len(pool)]
    decodes = [float((pool.cost.base_s + pool.cost.decode_row_s).min()) for pool in pools]
    return _sane(min(prefills, default=0.0)), need.output_tokens * _sane(min(decodes, default=0.0))


def _sane(seconds: float) -> float:
    """Workers that report nonsense must not keep anybody from being put in line."""
    return seconds if 0 <= seconds < math.inf else 0.0
