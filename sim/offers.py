"""A worker's offers of finished blocks to a store, on virtual time, after `kvtransfer.offerer`; which store is decided by its
rule (`kvtransfer.store_choice`). What is offered is held until the store has answered."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

from core.blocks import BlockKey, KvSource
from core.request import WorkerRole
from kvtransfer.directory import NodeRecord
from kvtransfer.store_choice import choose_store
from sim.events import Event
from sim.stores import BATCH_BLOCKS_MIN, Offer

if TYPE_CHECKING:
    from sim.plane import SimPlane
    from sim.worker import SimWorker

QUEUE_MAX = 16_384
SKIPPED_MAX = 65_536
BATCH_BLOCKS = 256
BATCH_BYTES = 16 * 2**20
OFFER_TIMEOUT_S = 10.0
PAUSE_MIN_S, PAUSE_MAX_S = 0.2, 5.0
"""These as in `kvtransfer.offerer`."""


class SimOfferer:
    def __init__(self, worker: SimWorker, plane: SimPlane) -> None:
        self._worker = worker
        self._plane = plane
        self._store: KvSource | None = None
        self._queue: OrderedDict[BlockKey, None] = OrderedDict()  # oldest first; a dict would be searched past all that left
        self._skipped: OrderedDict[BlockKey, None] = OrderedDict()
        self._batch: list[BlockKey] = []  # under way
        self._held: list[int] = []
        self._number = 0
        self._timer: Event | None = None
        self._resting = False
        self._pause_s = PAUSE_MIN_S

    def met(self, nodes: Sequence[NodeRecord]) -> bool:
        """Who is there. True when blocks go to another store from now on, which knows none of them yet."""
        before = self._store
        self._store = choose_store([n.source for n in nodes if n.role is WorkerRole.STORE], self._worker.source)
        self._go_on()
        return self._store is not None and self._store != before

    def offer(self, keys: Sequence[BlockKey]) -> None:
        """Blocks that became resident here; those that were skipped are left out, this once."""
        if self._store is None:
            return
        for key in keys:
            if key in self._skipped:
                del self._skipped[key]
            else:
                self._queue[key] = None
        _forget_oldest(self._queue, QUEUE_MAX)
        self._go_on()

    def skip(self, keys: Sequence[BlockKey]) -> None:
        """These will become resident here and need no offer: they come from a store, or from who offers them."""
        self._skipped.update(dict.fromkeys(keys))
        _forget_oldest(self._skipped, SKIPPED_MAX)

    def store_gone(self, name: str, epoch: int) -> None:
        """The connection broke."""
        store = self._store
        if self._batch and store is not None and (store.worker_id, store.epoch) == (name, epoch):
            self._answered(self._number, None)

    def held_blocks(self) -> list[list[int]]:
        return [self._held]

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _go_on(self) -> None:
        """The next batch, unless one is under way or the last one failed a moment ago."""
        worker, store = self._worker, self._store
        if not worker.alive or self._batch or self._resting or store is None or not self._queue:
            return
        wanted = max(BATCH_BLOCKS_MIN, BATCH_BYTES // worker.replica.layout.block_bytes)
        size = min(wanted, worker.inventory.counts().total // 8, BATCH_BLOCKS)
        batch = list(islice(self._queue, max(1, size)))
        worker.cut()
        found = worker.inventory.find(batch)
        self._held = [block for block in found if block is not None]
        self._batch = batch
        self._number += 1
        number, site = self._number, worker.site
        there = self._plane.store(store.worker_id, store.epoch)
        if there is None:
            site.events.later(2 * site.post.latency_s, lambda: self._answered(number, None))
            return
        keys = [key for key, block in zip(batch, found, strict=True) if block is not None]
        offer = Offer(worker, keys, lambda taken: self._answered(number, taken))
        site.post.send(worker.name, there.name, there.offered, offer)
        self._timer = site.events.later(OFFER_TIMEOUT_S, lambda: self._answered(number, None))

    def _answered(self, number: int, taken: int | None) -> None:
        """None: it failed, and is tried again after a pause."""
        worker = self._worker
        if number != self._number or not self._batch or not worker.alive:
            return
        if self._timer is not None:
            self._timer.cancel()
        batch, held, self._batch, self._held = self._batch, self._held, [], []
        worker.cut()
        worker.inventory.release(held)
        worker.poke()
        if taken is not None:
            self._pause_s = PAUSE_MIN_S
            for key in batch:
                self._queue.pop(key, None)
            self._go_on()
            return
        self._resting = True
        worker.site.events.later(self._pause_s, self._rested)
        self._pause_s = min(2 * self._pause_s, PAUSE_MAX_S)

    def _rested(self) -> None:
        self._resting = False
        self._go_on()


def _forget_oldest(keys: OrderedDict[BlockKey, None], most: int) -> None:
    while len(keys) > most:
        keys.popitem(last=False)
