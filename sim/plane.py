"""The KV plane of a simulated cluster: a directory whose word lags, stores that outlive workers, and each worker's share of
them. It is there with `sim.directory: true`; without, workers know at once what others have (`sim.fetches`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from core.blocks import BlockKey, KvLayout
from core.config import Config
from kvtransfer.directory import NodeRecord
from sim.directory import SimAnnouncer, SimDirectory
from sim.offers import SimOfferer
from sim.plane_fetches import PlaneFetches
from sim.stores import Loans, SimStore

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sim.site import Site
    from sim.worker import SimWorker


class SimPlane:
    """`stores`: the latest incarnation of each."""

    def __init__(self, site: Site, layout: KvLayout) -> None:
        config = site.config
        self.directory = SimDirectory(site.events, site.post, config.store.directory_timeout_s)
        self.stores: dict[str, SimStore] = {}
        self._site = site
        self._layout = layout
        self._taken = self._refused = 0  # by stores that are gone
        for name in store_names(config):
            self._start(name, 1)

    def _start(self, name: str, epoch: int) -> None:
        site = self._site
        store = SimStore(name, epoch, site.config, self._layout, site.events, site.post, site.network)
        store.on_blocks = SimAnnouncer(store, self.directory, site.events, site.config.store.directory_ttl_s).poke
        self.stores[name] = store

    def store(self, name: str, epoch: int) -> SimStore | None:
        """None: it is gone."""
        found = self.stores.get(name)
        return found if found is not None and found.epoch == epoch and found.alive else None

    def node(self, name: str, epoch: int) -> SimStore | SimWorker | None:
        """A store or a worker; None: it is gone."""
        return self.store(name, epoch) or self._site.find(name, epoch)

    def kill(self, store: SimStore) -> None:
        """The process dies now, with all it has in memory; another one takes its place after `sim.start_s`."""
        if not store.alive:
            return
        store.die()
        self._taken += store.taken_blocks
        self._refused += store.refused_blocks
        site, name, epoch = self._site, store.name, store.epoch
        for worker in site.workers.values():
            if worker.alive and worker.plane is not None:
                site.post.send(name, worker.name, worker.plane.offerer.store_gone, name, epoch)
        self.departed(name, epoch)
        site.events.later(site.config.sim.start_s, lambda: self._start(name, epoch + 1))

    def departed(self, name: str, epoch: int) -> None:
        """The controller tells the directory that somebody is dead."""
        self.directory.tell("controller", lambda table, now: table.leave(name, epoch, now))

    def summary(self) -> dict[str, Any]:
        """For the report."""
        shares = [worker.plane for worker in self._site.workers.values() if worker.plane is not None]
        alive = [store for store in self.stores.values() if store.alive]
        return {
            "taken_blocks": self._taken + sum(store.taken_blocks for store in alive),
            "refused_blocks": self._refused + sum(store.refused_blocks for store in alive),
            "stored_blocks": sum(store.inventory.counts().cached for store in alive),
            "fetched_blocks": sum(share.fetches.fetched_blocks for share in shares),
            "fetched_from_stores": sum(share.fetches.from_stores for share in shares),
            "unanswered": self.directory.unanswered,
        }


class WorkerShare:
    """What one worker does in it: announces, offers, fetches and lends."""

    def __init__(self, worker: SimWorker, plane: SimPlane) -> None:
        site = worker.site
        self.loans = Loans(worker, site.events)
        self.offerer = SimOfferer(worker, plane)
        self.fetches = PlaneFetches(worker, plane, self.loans, self.offerer.skip)
        self._offers = site.config.store.offer
        self.announcer = SimAnnouncer(
            worker, plane.directory, site.events, site.config.store.directory_ttl_s, self._added, self._met
        )

    def held_blocks(self) -> list[list[int]]:
        """References, a list per holder."""
        return self.loans.held_blocks() + self.fetches.held_blocks() + self.offerer.held_blocks()

    def _added(self, keys: Sequence[BlockKey]) -> None:
        if self._offers:
            self.offerer.offer(keys)

    def _met(self, nodes: Sequence[NodeRecord]) -> None:
        if self._offers and self.offerer.met(nodes):
            self.announcer.again()


def store_names(config: Config) -> list[str]:
    return [f"store-{number}" for number in range(config.store.nodes)] if config.sim.directory else []
