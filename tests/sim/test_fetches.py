"""What one prefill worker computed, another one fetches instead of computing it again."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.config import Config
from core.cost_file import write_cost_model
from core.cost_model import CostModel, StepCost
from sim.run import simulate
from sim.workload import Arrival
from sim.world import World

BLOCK = 16
PREFIX = tuple(range(40))
"""Names of blocks of 64 tokens that everybody's prompt begins with."""


def config(tmp_path: Path, bandwidth: float, **store: object) -> Config:
    """Two prefill workers, 1 ms a prompt token, 100 bytes of KV each."""
    path = tmp_path / "cost.json"
    write_cost_model(CostModel(StepCost(0.001, 0.001, 0.0, 0.0001, 0.0), 100), str(path))
    tree = {
        "engine": {"block_size": BLOCK, "kv_bytes": 2**24, "max_step_tokens": 512},
        "store": store,
        "sim": {
            "profile": str(path),
            "pools": [{"role": "prefill", "count": 2}, {"role": "decode", "count": 1}],
            "links": {"bandwidth": bandwidth, "latency": 0.001},
        },
    }
    return Config.model_validate(tree)


def spaced(count: int, gap_s: float) -> list[Arrival]:
    return [Arrival(n * gap_s, 64 * len(PREFIX) + 32, 4, (*PREFIX, 1000 + n), 64) for n in range(count)]


def played(configured: Config, arrivals: list[Arrival]) -> tuple[float, int]:
    """Share of prompt tokens that were cached, blocks that were fetched."""
    worlds: list[World] = []
    result = simulate(configured, arrivals, "round_robin", 0, prepare=worlds.append)
    assert result.report["completed"] == len(arrivals)
    for worker in worlds[0].site.workers.values():
        worker.check()
        assert worker.inventory.counts().active == 0, f"{worker.name} still holds blocks"
    fetched = sum(worker.exports.fetches.fetched_blocks for worker in worlds[0].site.workers.values())
    return float(result.report["prefix_hit_ratio"]), fetched


def test_the_second_worker_fetches_what_the_first_computed(tmp_path: Path) -> None:
    hit, fetched = played(config(tmp_path, 10_000_000), spaced(2, 10.0))
    assert fetched == 64 * len(PREFIX) // BLOCK
    assert hit == pytest.approx(0.49, abs=0.02), "all of the prefix, of every second prompt"


@pytest.mark.parametrize(
    ("bandwidth", "store"),
    [(10_000_000, {"fetch": False}), (50_000, {}), (100_000, {"fetch_always": True, "fetch_timeout_s": 0.5})],
)
def test_nothing_is_fetched(tmp_path: Path, bandwidth: float, store: dict[str, object]) -> None:
    """Not wanted; a link too slow for it to pay; too slow to come in time."""
    assert played(config(tmp_path, bandwidth, **store), spaced(2, 20.0)) == (0.0, 0)


def test_under_load_nothing_leaks_and_everybody_is_served(tmp_path: Path) -> None:
    hit, fetched = played(config(tmp_path, 300_000), spaced(60, 0.6))
    assert fetched > 0
    assert hit > 0.9


def test_a_source_that_dies_brings_nothing(tmp_path: Path) -> None:
    died: list[str] = []

    def prepare(world: World) -> None:
        def die() -> None:
            computed = (w for w in world.site.workers.values() if w.role.value == "prefill" and w.inventory.counts().cached)
            first = next(computed)
            died.append(first.name)
            world.kill(first)

        world.events.at(11.4, die)

    result = simulate(config(tmp_path, 500_000), spaced(2, 10.0), "round_robin", 0, prepare=prepare)
    assert died
    assert result.report["completed"] == 2
    assert result.report["prefix_hit_ratio"] == 0.0, "it was computed instead"
