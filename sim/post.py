"""Messages between the processes of a cluster: they take a link's latency, and do not cross a partition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sim.events import Events


class Post:
    """Two nodes reach each other while they are on the same side. What was sent is delivered or lost, never late by chance;
    so messages of one pair keep their order."""

    def __init__(self, events: Events, latency_s: float) -> None:
        self.latency_s = latency_s
        self.sent = 0
        self._events = events
        self._side: dict[str, int] = {}

    def send(self, source: str, dest: str, deliver: Callable[..., None], *args: Any) -> None:
        """Calls `deliver(*args)` at `dest` after the latency, unless the two are apart now."""
        if self._side and not self.together(source, dest):
            return
        self.sent += 1
        self._events.at(self._events.now() + self.latency_s, deliver, *args)

    def together(self, one: str, other: str) -> bool:
        return not self._side or self._side.get(one, 0) == self._side.get(other, 0)

    def cut_off(self, node: str, side: int) -> None:
        """From now on the node reaches only those of the same side; 0 is where everybody begins."""
        if side:
            self._side[node] = side
        else:
            self._side.pop(node, None)
