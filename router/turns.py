"""Readers take turns: a few are woken per round of the event loop, in the order in which something came for them.

A router that keeps up wakes everybody at once. One that does not hears its workers between two rounds, so that what comes
meanwhile for a reader still in line goes to it in the same message: the busier the router, the fewer messages it writes,
instead of the later it reads.
"""

from __future__ import annotations

import asyncio
from collections import deque

PER_ROUND = 16
"""A message takes tens of microseconds to write, so that workers are heard at least once per millisecond or two."""


class Turns:
    """Used from the asyncio thread."""

    def __init__(self) -> None:
        self._line: deque[asyncio.Future[None]] = deque()
        self._coming = False

    def wake(self, waiter: asyncio.Future[None]) -> None:
        """Sets its result, soon; one that is done or cancelled by then has lost nothing."""
        self._line.append(waiter)
        if not self._coming:
            self._coming = True
            asyncio.get_running_loop().call_soon(self._round)

    def _round(self) -> None:
        line = self._line
        for _ in range(min(PER_ROUND, len(line))):
            waiter = line.popleft()
            if not waiter.done():
                waiter.set_result(None)
        self._coming = bool(line)
        if self._coming:
            asyncio.get_running_loop().call_soon(self._round)
