"""What must hold after every event of a simulation, whatever goes wrong in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import chain

from core.errors import InternalError, InvalidRequestError, TandemError
from core.request import AttemptKey, TokenEvent
from sim.plane import SimPlane
from sim.requests import Request
from sim.stores import SimStore
from sim.watched import WatchedBooks, WatchedInventory, WatchedTable
from sim.worker import SimWorker
from sim.world import World


class BrokenRuleError(AssertionError):
    """The product, or the simulator, made a mistake. The text says which, and when."""


EVERYTHING_EVERY = 64
"""Looks into a worker, of which one is at all that it has, the others at what was touched."""


class Checks:
    """Attached to a world before it starts. Workers are looked into when their books changed: at what was touched, and now and
    then at everything."""

    def __init__(self, world: World) -> None:
        self.looks = 0
        self._world = world
        self._books: dict[str, object] = {}
        self._looks_at: Counter[str] = Counter()
        self._watched = WatchedBooks()
        world.site.books = self._watched
        world.users.checks = self._deliver
        world.users.on_completed = self._complete
        world.users.on_error = self._error
        world.events.after = self.after

    def after(self) -> None:
        stirred = self._watched.stirred
        if stirred:
            for name in stirred:
                worker = self._world.site.workers.get(name)
                if worker is not None and worker.alive:
                    self.looks += 1
                    self._worker(worker)
            stirred.clear()
        if self._world.site.plane is not None:
            self._stores(self._world.site.plane)

    def at_the_end(self) -> None:
        """Every request has ended, and enough time has passed for every lease to run out."""
        world = self._world
        self._rule(not world.users.live, f"{sorted(world.users.live)} never ended")
        self._rule(world.users.tally.requests == world.arrived, "a request was counted twice, or not at all")
        self._rule(not world.site.contents, "something is kept of a request that has ended")
        world.users.tally.check()
        for router in world.routers:
            dispatcher = router.dispatcher
            self._rule(not len(dispatcher) and not len(dispatcher.queue), f"{router.name} keeps journeys that have ended")
            self._rule(dispatcher.placer.claims.is_empty(), f"{router.name} claims what nobody occupies")
        for worker in world.site.workers.values():
            if worker.alive:
                worker.check()
                self._rule(not len(worker.table), f"{worker.name} keeps {worker.table.live()}")
                self._rule(worker.inventory.counts().active == 0, f"{worker.name} never gave blocks back")
                self._rule(worker.inventory.leases_open() == 0, f"{worker.name} keeps a lease")
        if world.site.plane is not None:
            self._plane_at_the_end(world.site.plane)

    # ---- users -----------------------------------------------------------------------------------------------------

    def _deliver(self, request: Request, tokens: tuple[TokenEvent, ...]) -> None:
        self._rule(not request.ends, f"{request.name} was sent tokens after its end")
        wrong = self._world.users.mistake(request, tokens)
        self._rule(not wrong, wrong)

    def _error(self, request: Request, error: TandemError) -> None:
        mistake = isinstance(error, InternalError | InvalidRequestError)
        self._rule(not mistake, f"{request.name} ended with a mistake of ours: {error.code}: {error.message}")

    def _complete(self, request: Request) -> None:
        self._rule(request.ends == 1, f"{request.name} ended {request.ends} times")
        due = request.content.output_tokens
        self._rule(len(request.times) == due, f"{request.name} was completed with {len(request.times)} of {due} tokens")

    # ---- workers ---------------------------------------------------------------------------------------------------

    def _worker(self, worker: SimWorker) -> None:
        inventory, table = worker.inventory, worker.table
        assert isinstance(inventory, WatchedInventory), "workers were made before the rules were attached"
        assert isinstance(table, WatchedTable), "workers were made before the rules were attached"
        looks = self._looks_at[worker.name] = self._looks_at[worker.name] + 1
        try:
            if looks % EVERYTHING_EVERY == 0:
                worker.check()
            inventory.check_touched()
            table.check_touched()
        except AssertionError as error:
            raise BrokenRuleError(f"{self._when()}: {worker.name}: {error}") from error
        leases = inventory.leases()
        self._references(worker, leases)
        known = worker.holders()
        for holder in leases:
            self._rule(holder in known, f"{worker.name} keeps a lease of {holder}, which is over there")
        if worker.settled:
            for key in worker.table.live():
                self._rule(key in known, f"{worker.name} lists {key} and holds nothing of it")

    def _references(self, node: SimWorker | SimStore, leases: Mapping[AttemptKey, list[int]]) -> None:
        """Those that somebody has, taken from those that there are, leave none."""
        left = node.inventory.references()
        for block in chain(*node.held_blocks(), *leases.values()):
            left[block] -= 1
        if any(left):
            block = next(block for block, count in enumerate(left) if count)
            count = node.inventory.references()[block]
            text = f"block {block} of {node.name} has {count} references, its holders have {count - left[block]}"
            self._rule(False, text)

    # ---- stores and the directory ----------------------------------------------------------------------------------

    def _stores(self, plane: SimPlane) -> None:
        for name, store in plane.stores.items():
            books = store.epoch, store.inventory.counts()
            if store.alive and self._books.get(name) != books:
                self._books[name] = books
                self.looks += 1
                self._store(store)

    def _store(self, store: SimStore) -> None:
        try:
            store.inventory.check()
        except AssertionError as error:
            raise BrokenRuleError(f"{self._when()}: {store.name}: {error}") from error
        self._references(store, store.inventory.leases())

    def _plane_at_the_end(self, plane: SimPlane) -> None:
        """Nothing happens any more: stores hold nothing for anybody, the directory names what is resident and nothing else."""
        nodes: list[SimWorker | SimStore] = [each for each in plane.stores.values() if each.alive]
        for store in plane.stores.values():
            if store.alive:
                self._store(store)
                self._rule(store.inventory.counts().active == 0, f"{store.name} never gave blocks back")
        nodes += [worker for worker in self._world.site.workers.values() if worker.alive]
        resident = {(each.name, each.epoch): {entry.key for entry in each.inventory.entries()} for each in nodes}
        table, now = plane.directory.table, self._world.events.now()
        table.check()
        for key in set().union(*resident.values()):
            located = table.locate(key, now).expand().holders
            named = {(holder.worker_id, holder.epoch) for holders in located for holder in holders}
            there = {node for node, keys in resident.items() if key in keys}
            self._rule(named == there, f"the directory names {sorted(named)} for a block that {sorted(there)} have")

    def _rule(self, holds: bool, text: str) -> None:
        if not holds:
            raise BrokenRuleError(f"{self._when()}: {text}")

    def _when(self) -> str:
        return f"{self._world.events.now():.6f} s, event {self._world.events.count}"
