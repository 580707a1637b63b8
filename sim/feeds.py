"""Tells routers which blocks a worker has, on virtual time: the shipped `ChangeFeed`, a portion every quarter of a second."""

from __future__ import annotations

from typing import TYPE_CHECKING

from core.kv_changes import ChangeFeed

if TYPE_CHECKING:
    from sim.router import SimRouter
    from sim.worker import SimWorker

GATHER_S = 0.25
"""As `worker.kv_feeds`."""
PORTIONS_MAX = 8


class SimFeeds:
    def __init__(self, worker: SimWorker) -> None:
        self._worker = worker
        self._feeds: dict[str, tuple[SimRouter, ChangeFeed]] = {}
        self._waiting = False

    def follow(self, router: SimRouter, stream: int) -> None:
        if self._worker.alive:
            self.end(router)
            self._feeds[router.name] = (router, ChangeFeed(self._worker.inventory, stream))
            self._tell_in(0.0)

    def end(self, router: SimRouter) -> None:
        known = self._feeds.pop(router.name, None)
        if known is not None:
            known[1].close()

    def poke(self) -> None:
        """Blocks may have come or gone."""
        if self._feeds and not self._waiting:
            self._tell_in(GATHER_S)

    def _tell_in(self, delay_s: float) -> None:
        self._waiting = True
        self._worker.site.events.later(delay_s, self._tell)

    def _tell(self) -> None:
        self._waiting = False
        worker, unsaid = self._worker, False
        if not worker.alive:
            return
        for router, feed in self._feeds.values():
            for _ in range(PORTIONS_MAX):
                changes = feed.next()
                if changes is None:
                    break
                worker.site.post.send(
                    worker.name, router.name, router.links.heard_of_blocks, worker.name, worker.epoch, changes
                )
            else:
                unsaid = True
        if unsaid:
            self._tell_in(GATHER_S)
