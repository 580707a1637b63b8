"""Blocks that another worker has, fetched before a prompt is computed: `worker.arrivals` and `kvtransfer.resident` on virtual
time.

One source per prompt, whoever has the longest prefix; where the product asks the directory, this looks at the workers
themselves, so no entry is ever out of date here. As there, a fetch is tried where it is predicted to take less than computing
what it brings, and what has not come within `store.fetch_timeout_s` is computed. Prompts of at most one named block are not
looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from core.blocks import BlockKey
from core.errors import OutOfBlocksError
from core.request import WorkItem
from sim.network import Flow
from sim.prompt import Prompt

if TYPE_CHECKING:
    from sim.worker import SimWorker


class _Fetch:
    """`blocks` are held here, `lent` at the source, both in the order of `keys`."""

    __slots__ = ("blocks", "flow", "keys", "lent", "source", "then")

    def __init__(
        self, source: SimWorker, keys: list[BlockKey], lent: list[int], blocks: list[int], then: Callable[[], None]
    ) -> None:
        self.source = source
        self.keys = keys
        self.lent = lent
        self.blocks = blocks
        self.then = then
        self.flow: Flow | None = None


class SimFetches:
    def __init__(self, worker: SimWorker) -> None:
        self._worker = worker
        self.fetched_blocks = 0
        self._out: dict[_Fetch, None] = {}
        self._lent: dict[_Fetch, None] = {}  # of others, from here
        store, self._size = worker.site.config.store, worker.config.block_size
        self._timeout_s = store.fetch_timeout_s
        self._always = store.fetch_always
        self._wanted = store.fetch and worker.config.prefix_cache

    def admit(self, item: WorkItem, then: Callable[[], None]) -> None:
        """Calls `then` at once where nothing is to be gained elsewhere, else once the blocks are here or time is up."""
        fetch = self._begin(item, then) if self._wanted else None
        if fetch is None:
            then()
            return
        worker, layout = self._worker, self._worker.replica.layout
        self._out[fetch] = fetch.source.exports.fetches._lent[fetch] = None
        num_bytes = len(fetch.lent) * layout.block_bytes
        fetch.flow = worker.site.network.move(fetch.source.name, worker.name, num_bytes, lambda: self._arrived(fetch))
        worker.site.events.later(self._timeout_s, lambda: self._late(fetch))

    def held_blocks(self) -> list[list[int]]:
        """References that fetches hold here, by those for prompts of ours and those from us."""
        return [fetch.blocks for fetch in self._out] + [fetch.lent for fetch in self._lent]

    def _begin(self, item: WorkItem, then: Callable[[], None]) -> _Fetch | None:
        """None: there is nothing to fetch, it would not pay, or there is no room for it."""
        prompt, worker = item.token_ids, self._worker
        full = (len(prompt) - 1) // self._size  # one token at least is computed
        if not isinstance(prompt, Prompt) or not full or prompt.content.block_tokens >= prompt.content.input_tokens:
            return None
        keys = prompt.content.keys(full)
        worker.cut()
        own = worker.inventory.prefix(keys)
        source, more = self._longest(keys[own:])
        if source is None or not self._pays(own, more):
            return None
        held = worker.inventory.match(keys[:own])
        try:
            blocks = worker.inventory.allocate(more)
        except OutOfBlocksError:
            return None
        finally:
            worker.inventory.release(held)
        missing = keys[own : own + more]
        return _Fetch(source, missing, source.inventory.match(missing), blocks, then)

    def _longest(self, missing: list[BlockKey]) -> tuple[SimWorker | None, int]:
        """Who else has most of what is missing here, and how many blocks. To be asked is no use of them."""
        worker, site = self._worker, self._worker.site
        best: SimWorker | None = None
        most = 0
        for other in site.workers.values() if missing else ():
            if other is worker or not other.alive or not other.inventory.has(missing[0]):
                continue
            if not site.post.together(other.name, worker.name):
                continue
            other.cut()
            count = other.inventory.prefix(missing)
            if count > most:
                best, most = other, count
        return best, most

    def _pays(self, own: int, more: int) -> bool:
        worker, size = self._worker, self._size
        if self._always:
            return True
        links = worker.site.config.sim.links
        fetch_s = links.latency + more * worker.replica.layout.block_bytes / links.bandwidth
        return fetch_s < worker.replica.cost.prefill_s(more * size, own * size) - worker.replica.cost.base_s

    def _arrived(self, fetch: _Fetch) -> None:
        """The copies are findable from now on; the prompt is told of them before they are let go."""
        worker = self._worker
        fetch.flow = None
        self._give_back(fetch)
        whole = worker.site.find(fetch.source.name, fetch.source.epoch) is fetch.source
        if worker.alive:
            worker.cut()
            if whole:
                worker.inventory.commit_run(fetch.blocks, fetch.keys, 0, len(fetch.keys))
                self.fetched_blocks += len(fetch.blocks)
                worker.on_blocks()
            fetch.then()
            worker.inventory.release(fetch.blocks)
        del self._out[fetch]

    def _late(self, fetch: _Fetch) -> None:
        if fetch.flow is None:
            return
        worker = self._worker
        worker.site.network.cancel(fetch.flow)
        fetch.flow = None
        self._give_back(fetch)
        if worker.alive:
            worker.cut()
            worker.inventory.release(fetch.blocks)
            fetch.then()
        del self._out[fetch]

    def _give_back(self, fetch: _Fetch) -> None:
        del fetch.source.exports.fetches._lent[fetch]
        if fetch.source.alive:
            fetch.source.cut()
            fetch.source.inventory.release(fetch.lent)
            fetch.source.poke()
