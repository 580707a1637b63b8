"""Tells the directory that this node lives and which blocks came and went, and hears from it who else is there."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from core.blocks import BlockKey
from core.clock import Clock
from core.errors import StaleEpochError
from core.inventory import Changes, Inventory
from kvtransfer.directory import Directory, DirectoryError, DuplicateNodeError, NodeRecord, Tier
from kvtransfer.gathering import gathered

log = logging.getLogger(__name__)

KEYS_MAX = 4096  # of one announcement
PAUSE_MIN_S = 0.2
PAUSE_MAX_S = 5.0
JOINS_WHILE_YOUNG = 8  # the first time to live is heard of others so many times as often


class Announcer:
    """One per worker; `run` until cancelled, then `leave`. While the directory is away nothing is lost but its hints:
    what changed meanwhile is remembered by the inventory, and it is told everything when it has forgotten.

    `added` hears of keys that became resident, also of all of them when everything is announced anew; `met` of all nodes
    that are alive, this one among them, after every join.
    """

    def __init__(
        self,
        directory: Directory,
        inventory: Inventory,
        record: Callable[[], NodeRecord],
        ttl_s: float,
        clock: Clock,
        *,
        added: Callable[[Sequence[BlockKey]], None],
        met: Callable[[Sequence[NodeRecord]], None],
    ) -> None:
        self.announced = 0
        self.failures = 0
        self._directory = directory
        self._inventory = inventory
        self._record = record
        self._ttl_s = ttl_s
        self._clock = clock
        self._added = added
        self._met = met
        self._every_s = ttl_s / 3 / JOINS_WHILE_YOUNG
        self._join_at = clock.now()
        self._pause_s = PAUSE_MIN_S
        self._refused = False  # at the last join: a newer self of ours is there, or another of our name
        self._everything = False
        self._unknown = False  # the directory holds nothing of ours
        self._unsaid: Changes | None = None  # told to the directory until it says that it heard
        self._news = asyncio.Event()

    def poke(self) -> None:
        """Blocks may have come or gone. Returns at once."""
        self._news.set()

    def again(self) -> None:
        """Everything is to be announced anew, and `added` to hear of it."""
        self._everything = True
        self.poke()

    async def run(self) -> None:
        while True:
            try:
                await self._turn()
                self._pause_s = PAUSE_MIN_S
            except DirectoryError as error:
                self.failures += 1
                log.debug("the directory did not hear us: %s", error.message)
                await self._pause()
                continue
            except (StaleEpochError, DuplicateNodeError) as error:
                self.failures += 1
                self._refused = True
                log.error("this worker is not announced: %s", error.message)
                await asyncio.sleep(self._ttl_s)
                continue
            await self._wait(self._join_at - self._clock.now())

    async def leave(self) -> None:
        """At the end: nobody shall look for blocks here any more. Where another has our name, it is not ours to take away."""
        if self._refused:
            return
        source = self._record().source
        try:
            await self._directory.leave(source.worker_id, source.epoch)
        except DirectoryError as error:
            log.info("the directory hears of our end when our time to live is over: %s", error.message)

    async def _turn(self) -> None:
        if self._clock.now() >= self._join_at:
            await self._join()
        while await self._announce():
            pass

    async def _join(self) -> None:
        if not await self._directory.join(self._record(), self._ttl_s):
            self._everything = self._unknown = True
            self._unsaid = None  # what it did not hear is part of everything, or gone since
        self._refused = False
        self._met(await self._directory.nodes())
        self._join_at = self._clock.now() + self._every_s
        self._every_s = min(2 * self._every_s, self._ttl_s / 3)

    async def _announce(self) -> bool:
        """Says one batch; False when nothing is left to say."""
        changes = self._unsaid or await self._next()
        source = self._record().source
        added = [(key, Tier.DRAM) for key in changes.added]
        removed = [(key, Tier.DRAM) for key in changes.removed]
        if added or removed:
            if not await self._directory.announce(source.worker_id, source.epoch, added, removed):
                self._everything, self._unsaid = True, None
                await self._join()
                return True
            self.announced += len(added) + len(removed)
        self._unsaid = None
        return len(added) + len(removed) >= KEYS_MAX

    async def _next(self) -> Changes:
        if self._everything and not self._unknown and self.announced:
            await self._begin_anew()
        asked, self._everything, self._unknown = self._everything, False, False
        changes = self._unsaid = self._inventory.changes(KEYS_MAX, everything=asked)
        if changes.added:
            self._added(changes.added)
        if changes.lost and not asked and self.announced:
            await self.leave()  # what it believes of us is not worth correcting piece by piece
            await self._directory.join(self._record(), self._ttl_s)
        return changes

    async def _begin_anew(self) -> None:
        """What it knows of us is forgotten first: removals that were not said yet are not part of everything."""
        source = self._record().source
        await self._directory.leave(source.worker_id, source.epoch)
        await self._directory.join(self._record(), self._ttl_s)

    async def _pause(self) -> None:
        self._join_at = self._clock.now()
        await asyncio.sleep(self._pause_s)
        self._pause_s = min(2 * self._pause_s, PAUSE_MAX_S)

    async def _wait(self, wait_s: float) -> None:
        try:
            async with asyncio.timeout(max(0.0, wait_s)):
                await self._news.wait()
        except TimeoutError:
            return
        await gathered(self._news)
