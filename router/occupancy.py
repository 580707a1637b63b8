"""Who decoded beside a request while it lived: what its token gaps are to be explained by. Deciding code.

A prediction is made before anybody knows who will come; what it is off by because others came or left says nothing of what a
step costs. So costs are corrected by what gaps took with those who really were there, as averages over the life of the request.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from router.view import Held

WORKERS_MAX = 16_384


class Mark(NamedTuple):
    """An instant on one worker: request-seconds and token-seconds of context decoded there until `at`."""

    worker: str
    at: float
    row_s: float
    context_s: float


class Occupancy:
    """Of this router's own requests, on the `WORKERS_MAX` workers used last."""

    def __init__(self) -> None:
        self._latest: OrderedDict[str, tuple[Mark, float, float]] = OrderedDict()

    def changed(self, worker: str, now: float, held: Held) -> None:
        """From now on it decodes these, without those whose prompts are still being computed elsewhere."""
        rows = float(held.running - held.coming)
        context = held.context_tokens * rows / held.running if held.running else 0.0
        self._latest[worker] = self.mark(worker, now), rows, context
        self._latest.move_to_end(worker)
        if len(self._latest) > WORKERS_MAX:
            self._latest.popitem(last=False)

    def mark(self, worker: str, now: float) -> Mark:
        mark, rows, context = self._latest.get(worker, (Mark(worker, now, 0.0, 0.0), 0.0, 0.0))
        past_s = max(now - mark.at, 0.0)
        return Mark(worker, now, mark.row_s + past_s * rows, mark.context_s + past_s * context)

    def since(self, begun: Mark, now: float) -> tuple[float, float] | None:
        """Mean of requests and of tokens they held, from `begun` until now; None when it is forgotten, or no time passed."""
        ended, past_s = self.mark(begun.worker, now), now - begun.at
        if past_s <= 0 or begun.worker not in self._latest or ended.row_s < begun.row_s:
            return None
        return (ended.row_s - begun.row_s) / past_s, max(ended.context_s - begun.context_s, 0.0) / past_s
