"""Who is to be woken when: one timer for any number of sleepers."""

from __future__ import annotations

import heapq
from collections.abc import Callable

from core.clock import Clock
from router.timers import Timer, Timers


class Alarms:
    """Rings for a name at or after its time. One alarm per name: an earlier one takes its place, a later one is dropped.

    `ring` is called once for every name that is due, with the time, and may set alarms again.
    """

    def __init__(self, clock: Clock, timers: Timers, ring: Callable[[str, float], None]) -> None:
        self._clock = clock
        self._timers = timers
        self._ring_for = ring
        self._at: dict[str, float] = {}
        self._heap: list[tuple[float, str]] = []
        self._timer: Timer | None = None

    def due(self, name: str) -> float:
        """When it rings next; infinity when it has none."""
        return self._at.get(name, float("inf"))

    def set(self, name: str, at: float) -> None:
        if at < self.due(name):
            self._at[name] = at
            heapq.heappush(self._heap, (at, name))
            if self._heap[0][0] == at:
                self._set_timer()

    def forget(self, name: str) -> None:
        """Its alarm, if it has one, rings for nobody."""
        self._at.pop(name, None)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        delay_s = max(self._heap[0][0] - self._clock.now(), 0.0)
        self._timer = self._timers.later(delay_s, self._ring)

    def _ring(self) -> None:
        self._timer = None  # it has rung; a sleeper that sets an alarm below starts another
        now = self._clock.now()
        while self._heap and self._heap[0][0] <= now:
            at, name = heapq.heappop(self._heap)
            if self._at.get(name) == at:
                del self._at[name]
                self._ring_for(name, now)
        if self._heap:
            self._set_timer()
