"""What the cost model leaves out, learned from how requests fared: a factor or an offset per worker. Deciding code.

A worker learns what its steps cost while they run. Left out are the way there and back, time lost between steps, other
processes on the same cores, and the turn a hand-off waits for: none of them is known beforehand, all of them are steady for a
while. So the median of the latest few outcomes of each worker corrects what is predicted next; one odd request moves nothing.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from router.facts import Facts
    from router.policy import Candidate

REMEMBERED = 15
OUTCOMES_MIN = 3
FACTOR_MAX = 20.0
WORKERS_MAX = 16_384


class Correction(NamedTuple):
    """Of one worker. `prefill` multiplies the cost of prompts, `gap` that of decode steps; `overhead_s` is added to a first
    token, `join_s` to the gap after it when the request was handed over."""

    prefill: float = 1.0
    gap: float = 1.0
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

    def observe(self, chosen: Candidate, at_s: float, facts: Facts) -> None:
        """A request ended where it had been placed by this candidate, `at_s` after its arrival."""
        first, decode = chosen.pair.prefill or chosen.pair.decode, chosen.pair.decode
        computing_s = facts.prefill.queue_s + facts.prefill.prefill_s
        if facts.first_token_at is not None and facts.prefill.prefill_s > 0:
            self._add(first, "overhead_s", max(facts.first_token_at - facts.arrived_at - at_s - computing_s, 0.0))
            if chosen.queue_s + chosen.prefill_s > 0:
                self._add(first, "prefill", _clipped(computing_s / (chosen.queue_s + chosen.prefill_s) * chosen.prefill_factor))
        if facts.first_token_at is None or facts.second_token_at is None or facts.last_token_at is None or facts.num_tokens < 3:
            return
        gap_s = (facts.last_token_at - facts.second_token_at) / (facts.num_tokens - 2)
        if gap_s > 0 and chosen.step_s > 0:
            self._add(decode, "gap", _clipped(gap_s / chosen.step_s * chosen.gap_factor))
        if chosen.pair.prefill is not None:
            late_s = facts.second_token_at - facts.first_token_at - gap_s - facts.decode.transfer_exposed_s
            self._add(decode, "join_s", max(late_s, 0.0))

    def _add(self, worker: str, name: str, value: float) -> None:
        series = self._workers.setdefault(worker, {}).setdefault(name, deque(maxlen=REMEMBERED))
        series.append(value)
        self._workers.move_to_end(worker)
        if len(series) >= OUTCOMES_MIN:
            self._known[worker] = self.of(worker)._replace(**{name: sorted(series)[len(series) // 2]})
        while len(self._workers) > WORKERS_MAX:
            self._known.pop(self._workers.popitem(last=False)[0], None)


def _clipped(factor: float) -> float:
    return min(max(factor, 1 / FACTOR_MAX), FACTOR_MAX)
