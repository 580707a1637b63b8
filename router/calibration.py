"""What the cost model leaves out, learned from how requests fared: a factor or an offset per worker. Deciding code.

A worker learns what its steps cost while they run. Left out are the way there and back, time lost between steps, other
processes on the same cores, and the turn a hand-off waits for: none of them is known beforehand, all of them are steady for a
while. So the median of the latest outcomes of each worker corrects what is predicted next; one odd request moves nothing.
A worker does not say how long a prompt waited for the step that was under way when it came. Of the way there and back the
lower quartile counts, which is that to an idle worker; what remains was spent computing, its own prompt or others.

What is kept is how long a standard chunk of prompt and a standard gap really took, not by how much a prediction was off:
workers fit their costs anew all the time, and a factor on an older fit would count twice what the new one knows.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from router.facts import Facts
    from router.policy import Candidate

REMEMBERED = 31
QUARTILE, MEDIAN = 0.25, 0.5
OUTCOMES_MIN = 3
CHUNK_TOKENS = 256
GAP_CONTEXT = 256
WORKERS_MAX = 16_384
MEASURABLE_S = 1e-6
"""What is predicted to take less says nothing: a quotient by it would be anything."""


class Correction(NamedTuple):
    """Of one worker. `chunk_s`: what a chunk of `CHUNK_TOKENS` of a prompt takes; `gap_s`: what a gap takes with one request of
    `GAP_CONTEXT` tokens; 0 while unknown. `overhead_s` is added to a first token, `join_s` to the gap after it when the request
    was handed over."""

    chunk_s: float = 0.0
    gap_s: float = 0.0
    overhead_s: float = 0.0
    join_s: float = 0.0


NO_CORRECTION = Correction()


class Calibration:
    """Bounded: the latest `REMEMBERED` outcomes of the `WORKERS_MAX` workers heard of last."""

    def __init__(self) -> None:
        self._workers: OrderedDict[str, dict[str, deque[float]]] = OrderedDict()
        self._known: dict[str, Correction] = {}

    def of(self, worker: str) -> Correction:
        return self._known.get(worker, NO_CORRECTION)

    def observe(self, chosen: Candidate, at_s: float, facts: Facts, standard_gaps: float | None = None) -> None:
        """A request ended where it had been placed by this candidate, `at_s` after its arrival. `standard_gaps`: how many
        standard gaps one should take with those who decoded beside it; None: as many as was predicted."""
        first, decode = chosen.pair.prefill or chosen.pair.decode, chosen.pair.decode
        if facts.first_ready_at is not None and facts.prefill.prefill_s > 0:
            whole_s = facts.first_ready_at - facts.arrived_at - at_s
            late_s = max(whole_s - facts.prefill.queue_s - facts.prefill.prefill_s, 0.0)
            overhead_s = self._add(first, "overhead_s", late_s, QUARTILE)
            if chosen.queue_s + chosen.prefill_s > MEASURABLE_S:
                computing_s = max(whole_s - overhead_s, facts.prefill.prefill_s)
                self._add(first, "chunk_s", computing_s / (chosen.queue_s + chosen.prefill_s) * chosen.standard_chunk_s)
        if facts.first_ready_at is None or facts.second_token_at is None or facts.last_token_at is None or facts.num_tokens < 3:
            return
        gap_s = (facts.last_token_at - facts.second_token_at) / (facts.num_tokens - 2)
        if standard_gaps is None and chosen.standard_gap_s > 0:
            standard_gaps = chosen.step_s / chosen.standard_gap_s
        if gap_s > 0 and chosen.step_s > MEASURABLE_S and standard_gaps:
            self._add(decode, "gap_s", gap_s / standard_gaps)
        if chosen.pair.prefill is not None:
            late_s = facts.second_token_at - facts.first_ready_at - gap_s - facts.decode.transfer_exposed_s
            self._add(decode, "join_s", max(late_s, 0.0))

    def _add(self, worker: str, name: str, value: float, share: float = MEDIAN) -> float:
        """Returns what the latest say now."""
        series = self._workers.setdefault(worker, {}).setdefault(name, deque(maxlen=REMEMBERED))
        series.append(value)
        self._workers.move_to_end(worker)
        found = sorted(series)[int(len(series) * share)]
        if len(series) >= OUTCOMES_MIN:
            self._known[worker] = self.of(worker)._replace(**{name: found})
        while len(self._workers) > WORKERS_MAX:
            self._known.pop(self._workers.popitem(last=False)[0], None)
        return found
