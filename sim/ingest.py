"""The destination's side of hand-offs on virtual time: reservations, pulls over the network, and what the router is told."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from core.blocks import BlockKey, Closing, KvTicket, block_keys, blocks_for
from core.errors import LeaseExpiredError, OutOfBlocksError, TransferError
from core.request import AttemptKey, AttemptTiming, WorkItem
from decode_worker.ingest import RESERVATION_S
from engine.role import Terms
from router import events as ev
from sim.network import Flow
from sim.prompt import Prompt

if TYPE_CHECKING:
    from sim.worker import SimWorker

STAYS = Terms(hand_over=False)
TRANSPORT = "network"


class _Reservation:
    """Blocks for one attempt's tokens and the one after them. The first `landed` of them hold their KV."""

    __slots__ = (
        "announced", "blocks", "bytes", "closed_at", "closing", "expires_at", "flow", "full", "item", "keys", "landed",
        "landed_at", "moving_since", "needed", "source", "transfer_s",
    )  # fmt: skip

    def __init__(self, item: WorkItem, keys: list[BlockKey], blocks: list[int], local: int, needed: int, until: float) -> None:
        self.item = item
        self.keys = keys
        self.blocks = blocks
        self.landed = local
        self.needed = needed
        self.full = len(keys)
        self.expires_at = until
        self.source: SimWorker | None = None  # once it is pulled
        self.flow: Flow | None = None
        self.announced = 0
        self.closing: Closing | None = None
        self.bytes = 0
        self.transfer_s = self.moving_since = self.closed_at = self.landed_at = 0.0


class SimIngests:
    def __init__(self, worker: SimWorker) -> None:
        self._worker = worker
        self._size = worker.config.block_size
        self._reservations: dict[AttemptKey, _Reservation] = {}
        self._landed: dict[AttemptKey, tuple[AttemptTiming, float]] = {}  # handed to the engine, not in the batch yet
        self._landing: dict[AttemptKey, list[int]] = {}  # ... and not even in the engine yet

    def __len__(self) -> int:
        return len(self._reservations)

    def keys(self) -> list[AttemptKey]:
        return [*self._reservations, *self._landed]

    def held_blocks(self) -> list[list[int]]:
        """A list per reservation, and per hand-over that waits for the step under way to end."""
        return [each.blocks for each in self._reservations.values()] + list(self._landing.values())

    def pulls(self, key: AttemptKey) -> bool:
        """Whether it is still being filled."""
        reservation = self._reservations.get(key)
        return reservation is not None and reservation.source is not None

    def reserve(self, item: WorkItem) -> None:
        """Answered at once, yes or no: the rules of `decode_worker.service` and `decode_worker.ingest`."""
        worker, key, size = self._worker, item.key, self._size
        if len(worker.engine) + len(self) + worker.entering >= worker.config.max_running:
            self._refuse(key, f"{worker.config.max_running} requests run here already")
            return
        inventory, now = worker.inventory, worker.site.events.now()
        worker.engine.sync(now)
        keys = keys_of(worker, item)
        found = inventory.match(keys) if worker.config.prefix_cache else []
        try:
            fresh = inventory.allocate(blocks_for(len(item.token_ids) + 1, size) - len(found))
        except OutOfBlocksError as error:
            inventory.release(found)
            self._refuse(key, error.message)
            return
        if worker.engine.squeezed(now):
            worker.cut()
        needed = blocks_for(len(item.token_ids), size)
        self._reservations[key] = _Reservation(item, keys, found + fresh, len(found), needed, now + RESERVATION_S)
        worker.talk.event(key, ev.Reserved(worker.name, key.attempt, True, cached_tokens=len(found) * size))

    def _refuse(self, key: AttemptKey, reason: str) -> None:
        worker = self._worker
        worker.talk.event(key, ev.Reserved(worker.name, key.attempt, False, reason))
        worker.table.end(key, worker.site.events.now())

    def pull(self, key: AttemptKey, ticket: KvTicket) -> bool:
        """False when nothing is reserved, or it is being filled already."""
        reservation, site = self._reservations.get(key), self._worker.site
        if reservation is None or reservation.source is not None:
            return False
        source = site.find(ticket.source.worker_id, ticket.source.epoch)
        if source is None:
            site.events.later(site.post.latency_s, lambda: self.lost(key, "the source is gone"))
            return True
        reservation.source = source
        if self._worker.plane is not None:  # the source offers them to a store, this worker need not
            self._worker.plane.offerer.skip(reservation.keys[reservation.landed : reservation.full])
        reservation.expires_at = self._lease_end()
        site.post.send(self._worker.name, source.name, source.exports.follow, key, self._worker)
        return True

    def told(self, key: AttemptKey, announced: int, closing: Closing | None) -> None:
        """News of the source: so many blocks, from the first on, can be read."""
        reservation = self._reservations.get(key)
        if reservation is None or not self._worker.alive:
            return
        reservation.announced = announced
        reservation.expires_at = self._lease_end()
        if closing is not None and reservation.closing is None:
            reservation.closing = closing
            reservation.closed_at = self._worker.site.events.now()
        self._go_on(key, reservation)

    def lost(self, key: AttemptKey, reason: str) -> None:
        """The hand-off failed."""
        if key in self._reservations and self._worker.alive:
            self.drop(key)
            self._worker.talk.fail(key, TransferError(reason))

    def source_gone(self, name: str, epoch: int) -> None:
        for key, reservation in list(self._reservations.items()):
            source = reservation.source
            if source is not None and source.name == name and source.epoch == epoch:
                self.lost(key, f"{name} is gone")

    def drop(self, key: AttemptKey) -> None:
        """Gives a reservation up. Idempotent."""
        self._landed.pop(key, None)
        reservation = self._reservations.pop(key, None)
        if reservation is None:
            return
        if reservation.flow is not None:
            self._worker.site.network.cancel(reservation.flow)
        self._worker.inventory.release(reservation.blocks)
        self._farewell(key, reservation)
        self._worker.poke()

    def forget(self, key: AttemptKey) -> None:
        """The engine holds nothing of it any more."""
        self._landed.pop(key, None)

    def expire(self, now: float) -> None:
        """Ends reservations that no ticket came for, and pulls from where nothing comes any more."""
        site = self._worker.site
        for key, reservation in list(self._reservations.items()):
            source = reservation.source
            if source is not None and source.alive and site.post.together(source.name, self._worker.name):
                reservation.expires_at = self._lease_end()
            elif reservation.expires_at <= now:
                self.drop(key)
                self._worker.talk.fail(key, LeaseExpiredError("the source has not been heard of for its lease"))

    def close(self) -> None:
        """The worker is gone: nothing moves to it any more."""
        for reservation in self._reservations.values():
            if reservation.flow is not None:
                self._worker.site.network.cancel(reservation.flow)

    def joined(self, key: AttemptKey, started: float) -> None:
        landed = self._landed.pop(key, None)
        if landed is not None:
            timing, at = landed
            timing = replace(timing, handoff_wait_s=max(0.0, started - at))
            self._worker.talk.event(key, ev.Joined(self._worker.name, key.attempt, timing))

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _go_on(self, key: AttemptKey, reservation: _Reservation) -> None:
        """All that was announced while the last batch was on its way goes next."""
        closing, worker = reservation.closing, self._worker
        if reservation.flow is not None:
            return
        if closing is not None and (closing.finished or reservation.landed >= reservation.needed):
            self._complete(key, reservation, closing)
        elif reservation.announced > reservation.landed and reservation.source is not None:
            upto = reservation.announced
            num_bytes = (upto - reservation.landed) * worker.replica.layout.block_bytes
            reservation.moving_since = worker.site.events.now()
            reservation.bytes += num_bytes
            reservation.flow = worker.site.network.move(
                reservation.source.name, worker.name, num_bytes, lambda: self._arrived(key, reservation, upto)
            )

    def _arrived(self, key: AttemptKey, reservation: _Reservation, upto: int) -> None:
        worker, now = self._worker, self._worker.site.events.now()
        reservation.flow = None
        reservation.transfer_s += now - reservation.moving_since
        reservation.landed_at = now
        full = min(upto, reservation.full)
        worker.inventory.commit_run(reservation.blocks, reservation.keys, reservation.landed, full)
        reservation.landed = upto
        worker.changed = True
        worker.on_blocks()
        self._go_on(key, reservation)

    def _complete(self, key: AttemptKey, reservation: _Reservation, closing: Closing) -> None:
        worker, now = self._worker, self._worker.site.events.now()
        del self._reservations[key]
        self._farewell(key, reservation)
        if closing.finished:
            worker.inventory.release(reservation.blocks)
            worker.table.end(key, now)
            worker.poke()
            return
        exposed_s = max(0.0, reservation.landed_at - reservation.closed_at)
        timing = AttemptTiming(
            transfer_s=reservation.transfer_s,
            transfer_exposed_s=exposed_s,
            transfer_bytes=reservation.bytes,
            transport=TRANSPORT if reservation.bytes else "",
        )
        self._landed[key] = (timing, now)
        self._landing[key] = reservation.blocks
        grown = replace(reservation.item, token_ids=reservation.item.token_ids + closing.generated)
        worker.call(lambda at: self._submit(grown, reservation.blocks, closing.num_tokens, at))

    def _submit(self, item: WorkItem, blocks: list[int], computed: int, now: float) -> None:
        worker = self._worker
        del self._landing[item.key]
        if item.key not in self._landed:
            worker.inventory.release(blocks)  # cancelled before the engine heard of it
        elif not worker.submit(item, now, STAYS, blocks, computed):
            self._landed.pop(item.key, None)

    def _farewell(self, key: AttemptKey, reservation: _Reservation) -> None:
        source, worker = reservation.source, self._worker
        if source is not None:
            worker.site.post.send(worker.name, source.name, source.exports.done, key)

    def _lease_end(self) -> float:
        transfer = self._worker.site.config.transfer
        return self._worker.site.events.now() + max(transfer.lease_s - transfer.lease_margin_s, 0.1)


def keys_of(worker: SimWorker, item: WorkItem) -> list[BlockKey]:
    """Of the item's full blocks."""
    size, tokens = worker.config.block_size, item.token_ids
    if isinstance(tokens, Prompt):
        return tokens.content.keys(len(tokens) // size)
    return block_keys(worker.root(item.cache_salt), tokens, size)
