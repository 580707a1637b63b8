"""What a worker still has to tell one router: bounded, in order, outliving a broken session for its lease."""

from __future__ import annotations

import asyncio
from collections import deque
from itertools import islice

from worker.messages import Event

EVENTS_PER_MESSAGE = 32


class Outbox:
    """Filled by the worker, emptied by the one session that is attached. Used from the asyncio thread only.

    An event leaves the box after it was written (`head`, write, `advance`), so a write that breaks loses nothing here.
    What waits together is told together: a message costs both ends more than what it says.
    """

    def __init__(self, bound: int) -> None:
        self._bound = bound
        self._events: deque[Event] = deque()
        self._changed = asyncio.Event()
        self._closed = False

    def __len__(self) -> int:
        return len(self._events)

    def put(self, event: Event) -> bool:
        """Never waits. False when the bound is reached (the owner then gives the router up) or the box is closed."""
        if self._closed or len(self._events) >= self._bound:
            return False
        self._events.append(event)
        self._changed.set()
        return True

    def close(self) -> None:
        """Nothing more will come; the reader gets what is left, then None."""
        self._closed = True
        self._changed.set()

    def hand_over(self) -> Outbox:
        """A new box with what is left in this one, which closes: a reader still holding it stops."""
        heir = Outbox(self._bound)
        heir._events.extend(self._events)
        self._events.clear()
        self.close()
        return heir

    async def head(self) -> list[Event]:
        """The next events, left in the box; none after the last ones of a closed box."""
        while not self._events and not self._closed:
            self._changed.clear()
            await self._changed.wait()
        return list(islice(self._events, EVENTS_PER_MESSAGE))

    def advance(self, count: int) -> None:
        """The first `count` were written."""
        for _ in range(min(count, len(self._events))):
            self._events.popleft()
