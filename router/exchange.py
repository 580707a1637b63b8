"""Tells other routers what tenants were served here, and hears what they served: off the way of any request."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Protocol

from core.clock import Clock
from core.errors import TandemError
from router.sharing import Service
from router.waiting_room import WaitingRoom

log = logging.getLogger(__name__)

EVERY_S = 0.25
AWAY_S = 2.0
"""After a failure it is left alone for this long."""


class Totals(Protocol):
    """Sums of service by tenant that all routers share."""

    async def add(self, told: Mapping[str, Service]) -> list[Service]:
        """Adds to the totals and returns them, in the order of `told`. Raises TandemError within its own deadline."""
        ...

    async def close(self) -> None: ...


class Exchange:
    """Goes on whatever happens to the totals; meanwhile this router goes by its own counters."""

    def __init__(self, room: WaitingRoom, totals: Totals, clock: Clock, every_s: float = EVERY_S) -> None:
        self._room = room
        self._totals = totals
        self._clock = clock
        self._every_s = every_s
        self._away = False
        room.sharing.on = True

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(self._every_s)
            if not await self.once():
                await asyncio.sleep(AWAY_S)

    async def once(self) -> bool:
        """One exchange; False when it failed."""
        told = self._room.sharing.to_tell(self._room.interesting())
        if not told:
            return True
        try:
            totals = await self._totals.add(told)
        except TandemError as error:
            self._room.sharing.not_told(told)
            if not self._away:
                log.warning("tenants are served by this router's own counters alone until %s", error)
            self._away = True
            return False
        except BaseException:
            self._room.sharing.not_told(told)
            raise
        if self._away:
            log.info("the service of tenants is shared between routers again")
        self._away = False
        self._room.heard(self._room.sharing.heard(told, totals), self._clock.now())
        return True
