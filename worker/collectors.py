"""A worker's metrics, read from its state when they are scraped. Names end in their unit; see docs for what they mean."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict

from prometheus_client.core import Metric

from core.inventory import Inventory
from core.samples import Samples as Samples
from core.samples import counter as counter
from core.samples import counters as counters
from core.samples import gauge as gauge
from core.samples import gauges as gauges
from core.telemetry import histogram_family
from worker.bridge import EngineThread
from worker.links import RouterLinks

OUTCOMES = ("finished", "failed", "cancelled", "superseded", "orphaned", "refused", "expired", "stopped")


class WorkerMetrics:
    """What every worker has: engine, blocks, attempts."""

    def __init__(self, engine: EngineThread, inventory: Inventory, links: RouterLinks) -> None:
        self._engine = engine
        self._inventory = inventory
        self._links = links

    def collect(self) -> Iterable[Metric]:
        engine, load = self._engine, self._engine.load
        yield gauge("tandem_engine_running", "Sequences in the running batch.", load.running)
        yield gauge("tandem_engine_waiting", "Sequences that wait for memory or a place in the batch.", load.waiting)
        yield gauge("tandem_engine_waiting_tokens", "Prompt tokens not yet computed.", load.waiting_tokens)
        yield counter("tandem_engine_computed_tokens_total", "Tokens computed, prompts included.", engine.computed_tokens)
        yield histogram_family("tandem_engine_step_seconds", "Duration of engine steps.", [(engine.step_s, {})])
        yield from self._step_cost()
        yield counter("tandem_worker_tokens_total", "Generated tokens sent to routers.", self._links.tokens_sent)
        yield from self._blocks()
        yield gauge("tandem_worker_attempts", "Attempts that live here.", len(self._links.table))
        outcomes = [((name,), self._links.outcomes[name]) for name in OUTCOMES]
        yield counters("tandem_worker_attempts_total", "Attempts by how they ended here.", ("outcome",), outcomes)

    def _step_cost(self) -> Iterable[Metric]:
        fit = self._engine.step_cost()
        if fit is None:
            return
        terms = [((name.removesuffix("_s"),), value) for name, value in asdict(fit.cost).items()]
        yield gauges("tandem_engine_step_cost_seconds", "What a step costs, learned, per unit of each term.", ("term",), terms)
        errors = [(("0.5",), fit.median_error), (("0.9",), fit.p90_error)]
        yield gauges("tandem_engine_step_cost_error", "Relative error of that on the steps seen.", ("quantile",), errors)

    def _blocks(self) -> Iterable[Metric]:
        counts = self._inventory.counts()
        states = [((state,), getattr(counts, state)) for state in ("free", "cached", "active")]
        yield gauges("tandem_kv_blocks", "KV blocks by state.", ("state",), states)
        yield gauge("tandem_kv_leases", "Leases on KV blocks that are open.", self._inventory.leases_open())
        yield gauge("tandem_kv_pinned_blocks", "Blocks that are not evicted.", self._inventory.pinned())
        gone = self._inventory.evictions
        evicted = [(("dram",), gone.for_space + gone.asked)]
        yield counters("tandem_kv_evictions_total", "Blocks evicted, by tier.", ("tier",), evicted)
        yield histogram_family("tandem_kv_evicted_idle_seconds", "How long evicted blocks had been idle.", [(gone.idle_s, {})])
