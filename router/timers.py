"""Who wakes a dispatcher: the event loop of its process, or virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol


class Timer(Protocol):
    def cancel(self) -> None:
        """It will not ring. Idempotent."""
        ...


class Timers(Protocol):
    """Calls come one at a time, on one thread, never from within `soon` or `later`."""

    def soon(self, call: Callable[[], None], /) -> object:
        """After what is happening now."""
        ...

    def later(self, delay_s: float, call: Callable[[], None], /) -> Timer: ...


class LoopTimers:
    """Those of the running event loop."""

    def soon(self, call: Callable[[], None], /) -> object:
        return asyncio.get_running_loop().call_soon(call)

    def later(self, delay_s: float, call: Callable[[], None], /) -> Timer:
        return asyncio.get_running_loop().call_later(delay_s, call)
