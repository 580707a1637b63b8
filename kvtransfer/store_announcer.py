"""Keeps the directory told what a store has: it joins again and again, and says what came and went in memory and on disk.

The directory is a hint: whatever it misses costs somebody a miss. It may die, come back empty, or be slow; then
everything is announced again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from core.clock import Clock
from core.errors import StaleEpochError, TandemError
from kvtransfer.directory import Directory, DuplicateNodeError, Tier
from kvtransfer.disk_changes import DiskChanges
from kvtransfer.gathering import gathered
from kvtransfer.store_node import StoreNode
from kvtransfer.store_plane import StorePlane

log = logging.getLogger(__name__)

KEYS_MAX = 16_384  # announced between two turns


class StoreAnnouncer:
    """Beside a StoreNode, on its loop."""

    def __init__(self, store: StoreNode, directory: Directory, ttl_s: float, clock: Clock) -> None:
        self.announced = 0
        """Keys, for the metrics."""
        self.failures = 0
        self._store = store
        self._directory = directory
        self._ttl_s = ttl_s
        self._clock = clock
        self._plane: StorePlane | None = None  # whose blocks were announced
        self._everything = True
        self._disk: DiskChanges | None = None
        self._joined_at: float | None = None
        self._refused = False  # at the last join: a newer self of ours is there, or another of our name

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self._store.changed.clear()
            more = False
            try:
                await self._join()
                more = await self._tell()
            except (StaleEpochError, DuplicateNodeError) as error:  # it goes on for those who know it; nobody else finds it
                self._failed()
                self._refused = True
                log.error("this store is not announced: %s", error.message)
                await asyncio.sleep(self._ttl_s)
                continue
            except TandemError as error:
                self._failed()
                log.debug("the directory did not take our announcements: %s", error.message)
                await asyncio.sleep(self._ttl_s / 3)
                continue
            if not more:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._ttl_s / 3):
                        await self._store.changed.wait()
            await gathered(self._store.changed)

    def _failed(self) -> None:
        self.failures += 1
        self._everything = True  # nobody knows which part was taken
        self._joined_at = None

    async def leave(self) -> None:
        """At the end, so that nobody asks us any more; without an answer our time to live runs out. Where another has our
        name, it is not ours to take away."""
        if self._refused:
            return
        try:
            await self._directory.leave(self._store.record().source.worker_id, self._store.epoch)
        except TandemError as error:
            log.debug("the directory did not hear that we leave: %s", error.message)

    async def _join(self) -> None:
        now, fresh = self._clock.now(), self._store.plane is not self._plane
        if self._joined_at is not None and not fresh and now - self._joined_at < self._ttl_s / 3:
            return
        if fresh and self._plane is not None:  # blocks of another layout: what was said of the old ones is void
            await self._directory.leave(self._store.record().source.worker_id, self._store.epoch)
        known = await self._directory.join(self._store.record(), self._ttl_s)
        self._refused = False
        self._joined_at = now
        if self._store.plane is not None:
            nodes = await self._directory.nodes()
            self._store.plane.fetcher.keep([node.source for node in nodes], self._ttl_s)
        if fresh or not known:
            self._plane = self._store.plane
            self._everything = True

    async def _tell(self) -> bool:
        """One portion of news; True when there is more."""
        plane, record = self._plane, self._store.record()
        if plane is None:
            return False
        changes = plane.inventory.changes(KEYS_MAX, everything=self._everything)
        if self._everything:
            self._disk = DiskChanges(plane.disk)
        assert self._disk is not None, "everything is told first"
        came, went = await self._disk.look(self._clock.now())
        added = [(key, Tier.DRAM) for key in changes.added] + [(key, Tier.DISK) for key in came]
        removed = [(key, Tier.DRAM) for key in changes.removed] + [(key, Tier.DISK) for key in went]
        if added or removed:
            known = await self._directory.announce(record.source.worker_id, record.source.epoch, added, removed)
            self._everything = not known
            if not known:
                self._joined_at = None
                return True
            self.announced += len(added) + len(removed)
        self._everything = False
        self._disk.told(came, went)
        return len(changes.added) + len(changes.removed) >= KEYS_MAX
