"""The source's side of hand-offs on virtual time: the shipped `Export` states, a follower that is told, leases that end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from core.errors import LeaseExpiredError
from core.request import AttemptKey, WorkItem
from engine.output import Prefilled
from engine.role import Terms
from kvtransfer.handoff import Export, ExportState
from router import events as ev
from sim.fetches import SimFetches

if TYPE_CHECKING:
    from sim.worker import SimWorker


class _Offer:
    __slots__ = ("announced", "export", "puller")

    def __init__(self, export: Export) -> None:
        self.export = export
        self.announced = 0  # blocks, from the first on
        self.puller: SimWorker | None = None


class SimExports:
    def __init__(self, worker: SimWorker) -> None:
        self._worker = worker
        self._lease_s = worker.site.config.transfer.lease_s
        self._terms = Terms(hand_over=True, lease_s=self._lease_s)
        self._offers: dict[AttemptKey, _Offer] = {}
        self.fetches = SimFetches(worker)

    def __contains__(self, key: object) -> bool:
        return key in self._offers

    def __len__(self) -> int:
        return len(self._offers)

    def keys(self) -> list[AttemptKey]:
        return list(self._offers)

    # ---- this worker's engine --------------------------------------------------------------------------------------

    def open(self, item: WorkItem) -> None:
        """A prompt to be computed and handed over."""
        self._offers[item.key] = _Offer(Export(item.key, self._lease_s, self._worker.site.events.now()))
        self._worker.fetches.admit(item, lambda: self._worker.call(lambda now: self._submit(item, now)))

    def _submit(self, item: WorkItem, now: float) -> None:
        worker, key = self._worker, item.key
        if key not in self._offers:
            return  # cancelled before the engine heard of it
        if worker.submit(item, now, self._terms):
            worker.talk.event(key, ev.Opened(worker.name, key.attempt, worker.ticket(key)))
        else:
            self.revoke(key, "the prompt was refused")

    def announce(self, key: AttemptKey, upto: int) -> None:
        offer = self._offers.get(key)
        if offer is not None and offer.export.announce((), self._worker.site.events.now()):
            offer.announced = upto
            self._tell(offer)

    def close(self, prefilled: Prefilled) -> None:
        """The prompt is computed; nobody wants it where its export has ended."""
        key, now = prefilled.key, self._worker.site.events.now()
        offer = self._offers.get(key)
        if offer is None or not offer.export.close(prefilled.closing, None, now):
            self._worker.inventory.end(key)
            return
        offer.announced += prefilled.partial is not None
        self._tell(offer)

    # ---- the other end ---------------------------------------------------------------------------------------------

    def follow(self, key: AttemptKey, puller: SimWorker) -> None:
        if not self._worker.alive:
            return
        offer = self._offers.get(key)
        if offer is None:
            self._say(puller, puller.ingests.lost, key, "the source knows of no such hand-off")
            return
        offer.puller = puller
        offer.export.renew(self._worker.site.events.now())
        self._tell(offer)

    def done(self, key: AttemptKey) -> None:
        """The puller needs nothing more, or has given up."""
        offer = self._offers.get(key)
        if offer is not None and self._worker.alive and offer.export.done():
            self._remove(offer)

    def revoke(self, key: AttemptKey, reason: str) -> None:
        """Idempotent; ends the lease too."""
        offer = self._offers.get(key)
        if offer is None:
            self._worker.inventory.end(key)
        elif offer.export.revoke(reason):
            if offer.puller is not None:
                self._say(offer.puller, offer.puller.ingests.lost, key, reason)
            self._remove(offer)

    def expire(self, now: float) -> None:
        """A puller that goes on and can reach us renews its lease all the time; of the others the time runs out, also of one
        whose word that it needs nothing more was lost."""
        worker = self._worker
        for key, offer in self._offers.items():
            puller = offer.puller
            if puller is None or not puller.alive or not puller.ingests.pulls(key):
                continue
            if worker.site.post.together(puller.name, worker.name):
                offer.export.renew(now)
                worker.inventory.renew(key, now + self._lease_s)
        expired = set(worker.inventory.expire(now))
        for key, offer in list(self._offers.items()):
            if offer.export.expire(now) or (key in expired and offer.export.revoke("its blocks' lease ran out")):
                self._remove(offer)

    def _remove(self, offer: _Offer) -> None:
        worker, export = self._worker, offer.export
        key = export.key
        del self._offers[key]
        worker.inventory.end(key)
        if export.closing is None:
            worker.call(lambda _: worker.engine.cancel(key))  # of no use to anybody any more
            if export.state is not ExportState.REVOKED:
                worker.talk.fail(key, LeaseExpiredError("the hand-off ended while its prompt was computed"))
        worker.table.end(key, worker.site.events.now())
        worker.poke()
        worker.on_blocks()

    def _tell(self, offer: _Offer) -> None:
        puller, export = offer.puller, offer.export
        if puller is not None:
            self._say(puller, puller.ingests.told, export.key, offer.announced, export.closing)

    def _say(self, puller: SimWorker, call: object, *args: object) -> None:
        assert callable(call)
        self._worker.site.post.send(self._worker.name, puller.name, call, *args)
