"""Memory set aside for hand-offs, and the pulls that fill it while the prompt is still computed elsewhere."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from core.blocks import BlockKey, KvTicket, block_keys, blocks_for
from core.clock import Clock
from core.config import EngineConfig
from core.errors import InternalError, LeaseExpiredError, TandemError, UnavailableError
from core.inventory import Inventory
from core.request import AttemptKey, WorkItem
from kvtransfer.puller import IngestPlan, IngestResult, Puller

log = logging.getLogger(__name__)

RESERVATION_S = 30.0
CLOSE_TIMEOUT_S = 5.0


@dataclass(slots=True, eq=False)
class Reservation:
    """Blocks for one attempt's tokens and the one after them. Held by whoever has the reservation, until handed on."""

    item: WorkItem
    plan: IngestPlan
    expires_at: float
    pulling: asyncio.Task[None] | None = None
    handed_on: bool = False  # the blocks are somebody else's now

    @property
    def key(self) -> AttemptKey:
        return self.item.key


class Outcome(Protocol):
    """Who hears how a hand-off went; called on the asyncio thread."""

    def landed(self, item: WorkItem, blocks: list[int], result: IngestResult, at: float) -> None:
        """The whole KV is here. The references on `blocks` are the callee's from now on."""
        ...

    def lost(self, key: AttemptKey, error: TandemError) -> None:
        """The hand-off failed and holds nothing any more."""
        ...


class Ingests:
    """Reservations by attempt. Every method but `close` returns at once; used from the asyncio thread only."""

    def __init__(
        self,
        puller: Puller,
        inventory: Inventory,
        root_key: Callable[[bytes, str], BlockKey],
        config: EngineConfig,
        clock: Clock,
        *,
        lossy: str = "",
        reservation_s: float = RESERVATION_S,
    ) -> None:
        """`root_key` takes a tenant's salt and a lossy codec or nothing; `lossy`: the lossy codec that KV may come through."""
        self._puller = puller
        self._inventory = inventory
        self._root_key = root_key
        self._config = config
        self._clock = clock
        self._lossy = lossy
        self._reservation_s = reservation_s
        self._outcome: Outcome | None = None
        self._reservations: dict[AttemptKey, Reservation] = {}
        self._pulls: set[asyncio.Task[None]] = set()  # of dropped reservations as well, until they let go of their blocks

    def __len__(self) -> int:
        return len(self._reservations)

    def bind(self, outcome: Outcome) -> None:
        self._outcome = outcome

    def reserve(self, item: WorkItem) -> int:
        """Sets memory aside for the item's tokens and the next one; says how many of them are resident already.

        Raises OutOfBlocksError; all or nothing.
        """
        size = self._config.block_size
        keys = block_keys(self._root_key(item.cache_salt, ""), item.token_ids, size)
        salted_keys = block_keys(self._root_key(item.cache_salt, self._lossy), item.token_ids, size) if self._lossy else []
        found = self._inventory.match(keys) if self._config.prefix_cache else []
        exact = len(found)
        if salted_keys and self._config.prefix_cache:  # exact blocks as far as they reach, then what came lossy before
            found += self._inventory.match(salted_keys[exact:])
        salted = set(range(exact, len(found)))
        try:
            fresh = self._inventory.allocate(blocks_for(len(item.token_ids) + 1, size) - len(found))
        except TandemError:
            self._inventory.release(found)
            raise
        local = frozenset(range(len(found)))
        plan = IngestPlan(keys, len(item.token_ids), found + fresh, local, self._lossy, salted_keys, salted, item.cache_salt)
        self._reservations[item.key] = Reservation(item, plan, self._clock.now() + self._reservation_s)
        return len(found) * size

    def pull(self, key: AttemptKey, ticket: KvTicket) -> Sequence[BlockKey]:
        """Starts filling a reservation, and says which keys it may bring that others hear of.

        Raises UnavailableError when there is none, or it is being filled already.
        """
        reservation = self._reservations.get(key)
        if reservation is None or reservation.pulling is not None or ticket.key != key:
            raise UnavailableError(f"nothing is reserved here for {key}, or it is being filled already")
        task = asyncio.create_task(self._pull(reservation, ticket), name=f"hand-off {key}")
        reservation.pulling = task
        self._pulls.add(task)
        task.add_done_callback(partial(self._pulled, reservation))
        plan = reservation.plan
        return plan.keys[len(plan.local) :]

    def drop(self, key: AttemptKey) -> None:
        """Gives a reservation up. Blocks that are being written into follow when the transport has let go of them."""
        reservation = self._reservations.pop(key, None)
        if reservation is None:
            return
        if reservation.pulling is None:
            self._inventory.release(reservation.plan.blocks)
        else:
            reservation.pulling.cancel()

    def expire(self) -> None:
        """Ends reservations that no ticket came for."""
        now = self._clock.now()
        for reservation in list(self._reservations.values()):
            if reservation.pulling is None and reservation.expires_at <= now:
                self.drop(reservation.key)
                self._lost(reservation.key, LeaseExpiredError(f"no hand-off was opened within {self._reservation_s:g} s"))

    async def close(self) -> None:
        """Drops everything and waits until no transport writes any more."""
        for key in list(self._reservations):
            self.drop(key)
        if self._pulls:
            await asyncio.wait(self._pulls, timeout=CLOSE_TIMEOUT_S)

    async def _pull(self, reservation: Reservation, ticket: KvTicket) -> None:
        key, plan = reservation.key, reservation.plan
        try:
            result = await self._puller.pull(ticket, plan)
        except Exception as error:
            if not isinstance(error, TandemError):
                log.exception("the hand-off of %s failed", key)
                error = InternalError(f"the hand-off failed: {type(error).__name__}")
            if self._forget(reservation):
                self._lost(key, error)
            return
        if self._forget(reservation) and self._outcome is not None:
            reservation.handed_on = True
            self._outcome.landed(reservation.item, plan.blocks, result, self._clock.now())

    def _pulled(self, reservation: Reservation, task: asyncio.Task[None]) -> None:
        """However the pull ended, and also when it was cancelled before it began."""
        self._pulls.discard(task)
        if not reservation.handed_on:
            self._inventory.release(reservation.plan.blocks)
        if not task.cancelled() and (mistake := task.exception()) is not None:
            log.error("taking in %s failed", reservation.key, exc_info=mistake)

    def _forget(self, reservation: Reservation) -> bool:
        """False when the attempt was dropped while its pull was coming to its end."""
        if self._reservations.get(reservation.key) is not reservation:
            return False
        del self._reservations[reservation.key]
        return True

    def _lost(self, key: AttemptKey, error: TandemError) -> None:
        if self._outcome is not None:
            self._outcome.lost(key, error)
