"""Blocks that the directory names, fetched before a prompt is computed: `worker.arrivals`, `kvtransfer.resident` and `flight`
on virtual time. What to fetch from whom, and where computing is quicker, the shipped `kvtransfer.residency` plans.

Unlike the product's, a fetch asks each node once: what that does not have any more is computed, not looked for elsewhere; and
two prompts that want the same blocks fetch them twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from core.blocks import BlockKey
from core.request import WorkItem
from kvtransfer.directory import Holder, pack
from kvtransfer.residency import Here, LinkCost, Prices, Share, plan
from sim.events import Event
from sim.ingest import keys_of
from sim.network import Flow
from sim.stores import Loans, SimStore, plane_layout

if TYPE_CHECKING:
    from kvtransfer.directory import Runs
    from sim.plane import SimPlane
    from sim.worker import SimWorker

ROOM_LEFT = 16
"""As in `kvtransfer.flight`."""


class _Fetch:
    """`keys` are missing; `blocks` are held for them here, by place, and `landed` are the places that were filled."""

    __slots__ = ("blocks", "flows", "keys", "open", "then", "timer")

    def __init__(self, keys: list[BlockKey], then: Callable[[], None]) -> None:
        self.keys = keys
        self.then = then
        self.blocks: dict[int, int] = {}
        self.flows: dict[Flow, Callable[[], None]] = {}  # and how to let its source go
        self.open = 0  # shares that may still bring something
        self.timer: Event | None = None


class PlaneFetches:
    def __init__(self, worker: SimWorker, plane: SimPlane, loans: Loans, skip: Callable[[Sequence[BlockKey]], None]) -> None:
        self.fetched_blocks = self.from_stores = 0
        self._worker = worker
        self._plane = plane
        self._loans = loans
        self._skip = skip
        self._fetches: dict[_Fetch, None] = {}
        store = worker.site.config.store
        self._wanted = store.fetch and worker.config.prefix_cache
        self._always = store.fetch_always
        self._timeout_s = store.fetch_timeout_s

    def admit(self, item: WorkItem, then: Callable[[], None]) -> None:
        """Calls `then` at once where nothing is to be gained elsewhere, else once blocks are here or time is up."""
        missing = self._missing(item) if self._wanted else []
        if not missing:
            then()
            return
        worker = self._worker
        fetch = _Fetch(missing, then)
        self._fetches[fetch] = None
        fetch.timer = worker.site.events.later(self._timeout_s, lambda: self._end(fetch))
        packed = pack(missing)
        self._plane.directory.ask(
            worker.name, lambda table, now: table.locate(packed, now), lambda runs: self._located(fetch, runs)
        )

    def held_blocks(self) -> list[list[int]]:
        return [list(fetch.blocks.values()) for fetch in self._fetches]

    def close(self) -> None:
        """The worker is gone; what it was lent comes back when its time is over."""
        for fetch in self._fetches:
            for flow in fetch.flows:
                self._worker.site.network.cancel(flow)

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _missing(self, item: WorkItem) -> list[BlockKey]:
        """What is not here of a prompt; nothing where asking for it takes longer than computing it."""
        worker = self._worker
        full = (len(item.token_ids) - 1) // worker.config.block_size  # one token at least is computed
        if not full:
            return []
        keys = keys_of(worker, item)[:full]
        worker.cut()
        found = worker.inventory.match(keys)
        worker.inventory.release(found)
        missing = keys[len(found) :]
        asking_s = 4 * worker.site.post.latency_s
        return missing if len(missing) * self._block_s(len(missing)) > asking_s else []

    def _block_s(self, blocks: int) -> float:
        """What computing one of so many takes."""
        if self._always:
            return float("inf")
        worker, size = self._worker, self._worker.config.block_size
        cost = worker.replica.cost
        return (cost.prefill_s(blocks * size) - cost.base_s) / blocks if blocks else 0.0

    def _located(self, fetch: _Fetch, runs: Runs | None) -> None:
        if fetch not in self._fetches or not self._worker.alive:
            return
        shares = self._plan(fetch, runs) if runs is not None and runs.runs else []
        self._make_room(fetch, sum(len(share.places) for share in shares))
        for share in shares:
            places = [place for place in share.places if place in fetch.blocks]
            if places:
                fetch.open += 1
                self._ask(fetch, share.holder, places)
        if not fetch.open:
            self._end(fetch)

    def _plan(self, fetch: _Fetch, runs: Runs) -> list[Share]:
        worker, links = self._worker, self._worker.site.config.sim.links
        price = LinkCost(2 * links.latency, float(links.bandwidth))
        prices = Prices(lambda holder, near: price, self._block_s(len(fetch.keys)), self._timeout_s)
        here = Here(worker.name, worker.name, plane_layout(worker.replica.layout))
        return plan(fetch.keys, runs.expand(), here, prices)

    def _make_room(self, fetch: _Fetch, count: int) -> None:
        """For the first so many places, or as many as streams in progress leave room for."""
        worker = self._worker
        worker.cut()
        counts = worker.inventory.counts()
        room = max(0, counts.free + counts.cached - counts.total // ROOM_LEFT)
        fetch.blocks = dict(enumerate(worker.inventory.allocate(min(count, room))))

    def _ask(self, fetch: _Fetch, holder: Holder, places: list[int]) -> None:
        site, name = self._worker.site, self._worker.name
        node = self._plane.node(holder.worker_id, holder.epoch)
        if node is None:
            site.events.later(2 * site.post.latency_s, lambda: self._done(fetch))
            return
        keys, reader = [fetch.keys[place] for place in places], object()

        def lend() -> None:
            loans = node.loans if isinstance(node, SimStore) else node.plane.loans if node.plane is not None else None
            if node.alive and loans is not None:
                found = loans.lend(reader, keys, 2 * self._timeout_s)
                site.post.send(node.name, name, partial(self._lent, fetch, node, loans, reader), [places[n] for n in found])

        site.post.send(name, node.name, lend)

    def _lent(self, fetch: _Fetch, node: SimStore | SimWorker, loans: Loans, reader: object, places: list[int]) -> None:
        worker = self._worker
        if fetch not in self._fetches or not worker.alive or not places:
            self._let_go(node, loans, reader)
            self._done(fetch)
            return

        def arrived() -> None:
            let_go = fetch.flows.pop(flow)
            self._arrived(fetch, node, places)
            let_go()

        flow = worker.site.network.move(node.name, worker.name, len(places) * worker.replica.layout.block_bytes, arrived)
        fetch.flows[flow] = lambda: self._let_go(node, loans, reader)

    def _let_go(self, node: SimStore | SimWorker, loans: Loans, reader: object) -> None:
        self._worker.site.post.send(self._worker.name, node.name, loans.end, reader)

    def _arrived(self, fetch: _Fetch, node: SimStore | SimWorker, places: list[int]) -> None:
        """They are findable from now on, where the whole of them came."""
        worker = self._worker
        if not worker.alive:
            return
        if node.alive and worker.site.post.together(node.name, worker.name):
            worker.cut()
            for place in places:
                fetch.blocks[place] = worker.inventory.commit(fetch.blocks[place], fetch.keys[place])
            self.fetched_blocks += len(places)
            if isinstance(node, SimStore):
                self.from_stores += len(places)
                self._skip([fetch.keys[place] for place in places])
            worker.on_blocks()
        self._done(fetch)

    def _done(self, fetch: _Fetch) -> None:
        """One share has brought what it could."""
        fetch.open -= 1
        if not fetch.open:
            self._end(fetch)

    def _end(self, fetch: _Fetch) -> None:
        """The prompt goes on; what came is let go after it has been told of it. Idempotent."""
        worker = self._worker
        if fetch not in self._fetches or not worker.alive:
            return
        if fetch.timer is not None:
            fetch.timer.cancel()
        for flow, let_go in fetch.flows.items():
            worker.site.network.cancel(flow)
            let_go()
        fetch.then()
        worker.cut()
        del self._fetches[fetch]
        worker.inventory.release(list(fetch.blocks.values()))
        worker.poke()
