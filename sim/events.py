"""Virtual time: a heap of things that happen, in order of time and then of when they were asked for."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

_WHEN, _CALL, _ARGS = 0, 2, 3


class Event(list[Any]):
    """An entry of the heap, [when, number, callback, arguments]: lists compare without a call of ours, numbers are distinct."""

    __slots__ = ()

    @property
    def when(self) -> float:
        return float(self[_WHEN])

    def cancel(self) -> None:
        """It will not happen. Idempotent; what it would have needed is let go at once."""
        self[_CALL], self[_ARGS] = None, ()


class Events:
    """The clock and what is to come. It is a `core.clock.Clock` and the timers of a dispatcher.

    An event is one entry that is popped and happens; `count` is how many did. Nothing happens before now.
    """

    __slots__ = ("_halted", "_heap", "_made", "_now", "after", "count")

    def __init__(self) -> None:
        self.count = 0
        self.after: Callable[[], None] | None = None
        """Called after every event, for checks."""
        self._now = 0.0
        self._made = 0
        self._halted = False
        self._heap: list[Event] = []

    def now(self) -> float:
        return self._now

    def __len__(self) -> int:
        return len(self._heap)

    def at(self, when: float, call: Callable[..., None], *args: Any) -> Event:
        """Has `call(*args)` happen at `when`, or now where that is past."""
        self._made = made = self._made + 1
        event = Event((when if when > self._now else self._now, made, call, args))
        heappush(self._heap, event)
        return event

    def soon(self, call: Callable[[], None]) -> Event:
        """After everything that is due now."""
        return self.at(self._now, call)

    def later(self, delay_s: float, call: Callable[[], None]) -> Event:
        return self.at(self._now + delay_s, call)

    def halt(self) -> None:
        """The event of this moment is the last one of this run."""
        self._halted = True

    def run(self, until: float = float("inf"), most: int | None = None) -> bool:
        """Lets happen what is due until then, at most so many events or until `halt`. False when nothing is left to come
        before `until`."""
        heap, after = self._heap, self.after
        self._halted = False
        end = None if most is None else self.count + most
        while heap and heap[0][0] <= until:
            if self.count == end or self._halted:
                return True
            when, _, call, args = heappop(heap)
            if call is None:
                continue
            self._now = when
            self.count += 1
            call(*args)
            if after is not None:
                after()
        return False
