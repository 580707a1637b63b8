"""Workers that one journey does not ask for now. Deciding code."""

from __future__ import annotations

import math

BACKOFF_S = 0.05
BACKOFF_MAX_S = 2.0


class Shunned:
    """Who said no, until the next wake: whoever wakes us knows that something changed. Who failed, for a while that grows."""

    def __init__(self) -> None:
        self.failures = 0
        self.retry_at = math.inf
        """When the first of those that failed may be asked again, as of the last look."""
        self._refused: set[str] = set()
        self._failed: dict[str, float] = {}  # until when

    def refused(self, worker: str) -> None:
        self._refused.add(worker)

    def failed(self, worker: str, now: float) -> None:
        self._failed[worker] = now + min(BACKOFF_S * 2.0 ** min(self.failures, 8), BACKOFF_MAX_S)

    def woken(self) -> None:
        self._refused.clear()

    def look(self, now: float) -> frozenset[str]:
        self._failed = {worker: until for worker, until in self._failed.items() if until > now}
        self.retry_at = min(self._failed.values(), default=math.inf)
        return frozenset(self._refused | self._failed.keys())
