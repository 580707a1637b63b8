"""Metrics of what the router knows of the nodes' blocks, read when they are scraped."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import Metric

from core.samples import counter, gauge
from router.block_index import BlockIndex
from router.kv_events import KvEvents


class IndexMetrics:
    def __init__(self, index: BlockIndex, events: KvEvents) -> None:
        self._index = index
        self._events = events

    def collect(self) -> Iterable[Metric]:
        yield gauge("tandem_router_index_blocks", "Block keys that the router knows a holder of.", len(self._index))
        yield gauge("tandem_router_index_bytes", "Memory of the index of blocks.", self._index.nbytes)
        yield counter("tandem_router_index_changes_total", "Portions of changes that nodes sent.", self._events.portions)
        yield counter("tandem_router_index_gaps_total", "Times that a node had to say everything again.", self._events.gaps)
