"""What a worker's metrics say of its blocks."""

from __future__ import annotations

from types import SimpleNamespace

from core.clock import ManualClock
from core.inventory import Inventory
from worker.collectors import WorkerMetrics


def test_evictions_are_counted_with_the_time_that_blocks_had_been_idle() -> None:
    clock = ManualClock()
    inventory = Inventory(2, clock=clock.now)
    blocks = inventory.allocate(2)
    inventory.release([inventory.commit(block, bytes([n]) * 16) for n, block in enumerate(blocks)])
    clock.advance(30.0)
    inventory.allocate(1)
    inventory.evict([bytes(16)])
    metrics = WorkerMetrics(SimpleNamespace(), inventory, SimpleNamespace())  # type: ignore[arg-type]
    samples = {s.name + s.labels.get("le", ""): s.value for family in metrics._blocks() for s in family.samples}
    assert samples["tandem_kv_evictions_total"] == 2
    assert samples["tandem_kv_evicted_idle_seconds_sum"] == 60
    assert samples["tandem_kv_evicted_idle_seconds_bucket15.0"] == 0
    assert samples["tandem_kv_evicted_idle_seconds_bucket60.0"] == 2
