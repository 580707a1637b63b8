"""Who waits for a place, and who is next. Deciding code."""

from __future__ import annotations


class WaitQueue:
    """First come, first served, but requests that already have tokens out (failovers) go before new ones.

    The head keeps its turn while it is probing for a place: a refusal costs it nothing, and nobody overtakes it.
    """

    def __init__(self, max_waiting: int) -> None:
        self.bound = max_waiting
        self._urgent: dict[str, None] = {}  # insertion order
        self._new: dict[str, None] = {}

    def __len__(self) -> int:
        return len(self._urgent) + len(self._new)

    def __contains__(self, journey_id: str) -> bool:
        return journey_id in self._urgent or journey_id in self._new

    def has_room(self) -> bool:
        """For one more new request; a failover is always let in, it was admitted before."""
        return len(self) < self.bound

    def add(self, journey_id: str, *, urgent: bool) -> None:
        if journey_id not in self:
            (self._urgent if urgent else self._new)[journey_id] = None

    def remove(self, journey_id: str) -> None:
        self._urgent.pop(journey_id, None)
        self._new.pop(journey_id, None)

    def head(self) -> str | None:
        for queue in (self._urgent, self._new):
            for journey_id in queue:
                return journey_id
        return None


class Pace:
    """How fast places come free: what a refused user is told to wait."""

    RETRY_MIN_S, RETRY_MAX_S = 1.0, 60.0
    _WEIGHT = 0.1  # of the newest gap

    def __init__(self) -> None:
        self._last_at: float | None = None
        self._gap_s = 0.0

    def accepted(self, now: float) -> None:
        """A request has got its place."""
        if self._last_at is not None:
            self._gap_s += self._WEIGHT * (now - self._last_at - self._gap_s)
        self._last_at = now

    def time_for(self, requests: int) -> float:
        """Seconds until so many more have theirs, by the moving average of the gaps; within sensible bounds."""
        return min(max(requests * self._gap_s, self.RETRY_MIN_S), self.RETRY_MAX_S)
