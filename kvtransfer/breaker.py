"""A circuit breaker: a server that is away or stalls costs a few requests its timeout, not every one. Deciding code."""

from __future__ import annotations


class Breaker:
    """Closed until a call fails; then calls are refused but for one try after a pause, which doubles up to a limit."""

    def __init__(self, pause_min_s: float = 0.5, pause_max_s: float = 5.0) -> None:
        assert 0 < pause_min_s <= pause_max_s
        self._pause_min_s = pause_min_s
        self._pause_max_s = pause_max_s
        self._pause_s = pause_min_s
        self._open_until: float | None = None
        self._trying = False

    def allows(self, now: float) -> bool:
        """Whether to call. Where it was open, this call is the try, and others wait for another pause."""
        if self._open_until is None:
            return True
        if now < self._open_until:
            return False
        self._open_until = now + self._pause_s
        self._trying = True
        return True

    def succeeded(self) -> None:
        self._open_until = None
        self._trying = False
        self._pause_s = self._pause_min_s

    def failed(self, now: float) -> None:
        """While it is open only the try counts, not calls that were under way before."""
        if self._open_until is not None:
            if not self._trying:
                return
            self._pause_s = min(2 * self._pause_s, self._pause_max_s)
        self._open_until = now + self._pause_s
        self._trying = False
