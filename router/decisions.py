"""The latest decisions with what was predicted and what came of it: what `tandem explain` tells. Deciding code.

Bounded: `KEPT_MAX` decisions in all, of one request the latest `PER_REQUEST_MAX`, of each the best `CANDIDATES_MAX`
candidates: 40 MiB at most. A request that was decided on longest ago is forgotten first, whole.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field

from core.errors import NotFoundError, TandemError
from core.request import Slo
from router.frontend_types import Placement, Timing
from router.policy import Candidate, Decision, Nobody, Pair

KEPT_MAX = 10_000
PER_REQUEST_MAX = 8
CANDIDATES_MAX = 4


@dataclass(frozen=True, slots=True)
class Made:
    """One decision, `at_s` after the request arrived. `place` None: nobody could take it, `reason` says why.

    The first of `candidates` is the chosen one where anything was predicted.
    """

    at_s: float
    place: Pair | None
    reason: str
    candidates: tuple[Candidate, ...] = ()

    @property
    def chosen(self) -> Candidate | None:
        return self.candidates[0] if self.place is not None and self.candidates else None


@dataclass(frozen=True, slots=True)
class Outcome:
    """How it ended. `finish`: a finish reason, or the code of the error that `message` explains."""

    finish: str
    timing: Timing
    tokens: int
    cached_tokens: int
    failovers: int
    placement: Placement
    message: str = ""


@dataclass(slots=True)
class Explanation:
    """One choice of one request. Filled while it lives; `output_tokens` is how long its answer was predicted to become.

    `slo_class` is the class it was counted in.
    """

    request_id: str
    policy: str
    slo_class: str
    slo: Slo
    prompt_tokens: int
    output_tokens: int
    decisions: deque[Made] = field(default_factory=lambda: deque(maxlen=PER_REQUEST_MAX))
    forgotten: int = 0
    """Decisions on it that were made before those."""
    outcome: Outcome | None = None

    @property
    def last(self) -> Made:
        return self.decisions[-1]

    @property
    def ttft_error(self) -> float | None:
        """|predicted − actual| / actual, of the time from the last decision to the first token: waiting before it was
        no prediction. None where there was none, or where a failover came in between."""
        chosen, outcome = self.last.chosen, self.outcome
        if chosen is None or outcome is None or outcome.failovers or outcome.timing.ttft_s <= self.last.at_s:
            return None
        return relative_error(chosen.ttft_s, outcome.timing.ttft_s - self.last.at_s)

    @property
    def tpot_error(self) -> float | None:
        chosen, outcome = self.last.chosen, self.outcome
        if chosen is None or outcome is None or outcome.failovers or outcome.timing.tpot_s <= 0:
            return None
        return relative_error(chosen.tpot_s, outcome.timing.tpot_s)


class Decisions:
    """By the workers' name of a choice: `ID`, `ID/1` … An id that is used again is explained by its latest use."""

    def __init__(self, kept_max: int = KEPT_MAX) -> None:
        self._kept_max = kept_max
        self._known: OrderedDict[str, Explanation] = OrderedDict()
        self._kept = 0

    def __len__(self) -> int:
        """Decisions kept; never more than `kept_max`, but for those of the latest request."""
        return self._kept

    def decided(self, about: Explanation, at_s: float, decision: Decision) -> Explanation:
        """Notes a decision on the request that `about` describes; returns what is kept of it."""
        known = self._known.get(about.request_id)
        if known is None or known.outcome is not None:
            if known is not None:
                self._drop(about.request_id)
            known = self._known[about.request_id] = about
        known.forgotten += len(known.decisions) == PER_REQUEST_MAX
        self._kept += len(known.decisions) < PER_REQUEST_MAX
        known.decisions.append(_made(at_s, decision))
        self._known.move_to_end(about.request_id)
        while self._kept > self._kept_max and len(self._known) > 1:
            self._drop(next(iter(self._known)))
        return known

    def ended(self, request_id: str, outcome: Outcome) -> Explanation | None:
        """None when nothing is known of it (any more): it was never placed, or is forgotten."""
        known = self._known.get(request_id)
        if known is not None:
            known.outcome = outcome
        return known

    def refused(self, about: Explanation, at_s: float, error: TandemError, *, placed: bool) -> None:
        """It was turned away. `placed`: it had been let in, so that what is known of it by now is of this use of its id."""
        if placed and about.request_id in self._known:
            return
        known = self.decided(about, at_s, Decision(Nobody(error.message, busy=False)))
        known.outcome = Outcome(error.code, Timing(total_s=at_s), 0, 0, 0, Placement("", ""), error.message)

    def explain(self, request_id: str) -> Explanation:
        """Raises NotFoundError that says how far back memory goes."""
        known = self._known.get(request_id)
        if known is None:
            text = f"no decision on request {request_id!r} is kept; this router keeps its last {self._kept_max} decisions"
            raise NotFoundError(f"{text} and has {self._kept} now, of {len(self._known)} requests; check the id and the router")
        return known

    def _drop(self, request_id: str) -> None:
        self._kept -= len(self._known.pop(request_id).decisions)


def _made(at_s: float, decision: Decision) -> Made:
    if isinstance(decision.place, Nobody):
        return Made(at_s, None, decision.place.reason)
    return Made(at_s, decision.place, decision.reason, decision.candidates[:CANDIDATES_MAX])


def relative_error(predicted_s: float, actual_s: float) -> float:
    return abs(predicted_s - actual_s) / actual_s
