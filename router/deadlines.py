"""Until when a journey may take: in all, for a place, and for the answer that its attempt waits for. Deciding code."""

from __future__ import annotations

from core.errors import DeadlineExceededError, OverloadedError, TandemError, UnavailableError
from router.attempt import Limits


class Deadlines:
    def __init__(self, limits: Limits, now: float) -> None:
        self.end = now + limits.request_timeout_s
        self.answer: float | None = None
        """None: nothing is waited for that is answered soon."""
        self.held: float | None = None
        """Until when the first token is kept."""
        self._limits = limits
        self._place = 0.0
        self.seek(now)

    def seek(self, now: float) -> None:
        """It looks for a place from now on."""
        self._place = now + self._limits.queue_timeout_s

    def wake_at(self, *, queued: bool) -> float:
        """The first of those that count."""
        soonest = self._place if queued else self.answer
        found = self.end if soonest is None else min(self.end, soonest)
        return found if self.held is None else min(found, self.held)

    def missed(self, now: float, *, queued: bool, why_waiting: str, busy: bool) -> TandemError | None:
        """What the user is told when it may go on no longer. `busy`: waiting might have helped."""
        if now >= self.end:
            text = f"not finished within {self._limits.request_timeout_s:g} s ({self._limits.timeout_name})"
            return DeadlineExceededError(text)
        if queued and now >= self._place:
            waited_s = self._limits.queue_timeout_s
            text = f"no place within {waited_s:g} s (router.queue_timeout_s): {why_waiting}; retry later"
            kind = OverloadedError if busy else UnavailableError
            return kind(text, retry_after_s=1.0)
        return None

    def unanswered(self, now: float) -> bool:
        return self.answer is not None and now >= self.answer
