"""Make these block keys resident here: the one way prompts get at KV that was computed elsewhere or earlier."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from core.blocks import BlockKey
from kvtransfer.directory import Tier
from kvtransfer.flight import Flight, Ground, ResidentStats
from kvtransfer.link_costs import ASSUMED

ASKING_S = 0.001 + ASSUMED[True, Tier.DRAM].latency_s
"""What asking the directory, and then the best of sources, is taken to cost."""


class Resident:
    """One per worker. Any number of prompts at the same time; two that want the same missing blocks fetch them once.

    `company()` says whether any other node could have blocks of ours at all.
    """

    def __init__(self, ground: Ground, company: Callable[[], bool]) -> None:
        self._ground = ground
        self._company = company
        self._flights: dict[BlockKey, Flight] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def stats(self) -> ResidentStats:
        return self._ground.stats

    def may_pay(self, blocks: int) -> bool:
        """Whether asking others for so many blocks can pay at all."""
        return self._company() and blocks * self._ground.compute_block_s() > ASKING_S

    def worth_asking(self, keys: Sequence[BlockKey]) -> bool:
        """Whether `ensure` would look elsewhere: somebody else is there, and what is missing takes longer to compute than
        to ask for. Takes microseconds, so that prompts that gain nothing lose nothing."""
        found = self._ground.inventory.look(keys)
        self._ground.inventory.release([block for block in found if block is not None])
        missing = found.count(None)
        return missing > 0 and self.may_pay(missing)

    async def ensure(self, keys: Sequence[BlockKey], tenant: bytes, deadline_s: float) -> list[int]:
        """The blocks of the longest prefix of `keys` that is here within `deadline_s`, a reference on each for the caller.

        Never raises but CancelledError; then nothing is held. Whatever goes wrong on the way is a shorter prefix.
        """
        inventory, stats, clock = self._ground.inventory, self._ground.stats, self._ground.clock
        started = clock.now()
        found = inventory.look(keys)  # the engine uses them, we do not
        local = next((place for place, block in enumerate(found) if block is None), len(keys))
        missing = [key for key, block in zip(keys, found, strict=True) if block is None]
        try:
            if missing and self._company():
                stats.asked += 1
                await self._bring(missing, tenant, started + deadline_s)
                stats.seconds.observe(clock.now() - started)
            blocks = inventory.match(keys)
        finally:
            inventory.release([block for block in found if block is not None])
        stats.prompts += 1
        stats.blocks["local", "dram"] += local
        stats.misses += len(keys) - len(blocks)
        return blocks

    async def close(self) -> None:
        """Ends what is under way and waits until nothing writes here any more and every node was told."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._ground.holds.close()

    async def _bring(self, missing: Sequence[BlockKey], tenant: bytes, until: float) -> None:
        flights = {id(flight): flight for key in missing if (flight := self._flights.get(key)) is not None}
        own = [key for key in missing if key not in self._flights]
        if own:
            flight = self._launch(own, tenant, until)
            flights[id(flight)] = flight
        for flight in flights.values():
            flight.waiters += 1
        wanted = set(missing)
        try:
            async with asyncio.timeout(until - self._ground.clock.now()):
                for flight in flights.values():
                    await flight.landed(wanted)
        except TimeoutError:
            self.stats.timeouts += 1  # what has landed by now is here
        finally:
            for flight in flights.values():
                flight.waiters -= 1
                if not flight.waiters:
                    flight.task.cancel()

    def _launch(self, keys: Sequence[BlockKey], tenant: bytes, until: float) -> Flight:
        flight = Flight(self._ground, keys, tenant, until)
        self._flights.update(dict.fromkeys(keys, flight))
        self._tasks.add(flight.task)
        flight.task.add_done_callback(lambda task: self._end(flight))
        return flight

    def _end(self, flight: Flight) -> None:
        self._tasks.discard(flight.task)
        for key in flight.keys:
            if self._flights.get(key) is flight:
                del self._flights[key]
