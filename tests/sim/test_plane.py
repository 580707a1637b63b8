"""The KV plane in a simulation: stores outlive workers, the directory lags and can be lost, and no request fails for it."""

from __future__ import annotations

from typing import Any

import pytest

from core.config import Config
from core.cost_model import CostModel, StepCost
from core.errors import ConfigError
from sim.checks import BrokenRuleError
from sim.faults import Fault, read_faults
from sim.plane import store_names
from sim.run import SimResult, simulate
from sim.workload import Arrival
from sim.world import World

BLOCK = 16
PREFIX = tuple(range(40))
"""Names of blocks of 64 tokens that everybody's prompt begins with."""
SHARED = 64 * len(PREFIX) // BLOCK
MODEL = CostModel(StepCost(0.001, 0.001, 0.0, 0.0001, 0.0), 100)
"""1 ms a prompt token, 100 bytes of KV each: a prompt takes 2.6 s."""


def config(prefill: int = 2, **store: object) -> Config:
    tree: dict[str, Any] = {
        "engine": {"block_size": BLOCK, "kv_bytes": 2**24, "max_step_tokens": 512},
        "store": {"dram_bytes": 2**20, **store},
        "sim": {
            "directory": True,
            "start_s": 0.5,
            "pools": [{"role": "prefill", "count": prefill}, {"role": "decode", "count": 1}],
            "links": {"bandwidth": 10_000_000, "latency": 0.001},
        },
    }
    return Config.model_validate(tree)


def prompts(*at_s: float) -> list[Arrival]:
    return [Arrival(at, 64 * len(PREFIX) + 32, 4, (*PREFIX, 1000 + n), 64) for n, at in enumerate(at_s)]


def played(configured: Config, arrivals: list[Arrival], *faults: Fault, prepare: Any = lambda world: None) -> SimResult:
    result = simulate(configured, arrivals, "round_robin", 0, faults=faults, checks=True, model=MODEL, prepare=prepare)
    assert result.report["completed"] == len(arrivals), result.errors
    return result


def test_the_second_worker_fetches_what_the_first_computed_and_the_store_took() -> None:
    plane = played(config(), prompts(0, 10)).report["kv_plane"]
    assert plane["fetched_blocks"] == SHARED
    assert plane["stored_blocks"] >= SHARED
    assert plane["refused_blocks"] == plane["unanswered"] == 0


def both_die(at_s: float) -> tuple[Fault, Fault]:
    """Decode workers have the blocks of a prompt too."""
    return Fault(at_s, "kill", "prefill-0"), Fault(at_s, "kill", "decode-0")


def test_a_store_outlives_the_workers() -> None:
    report = played(config(1), prompts(0, 10), *both_die(5.0)).report
    assert report["kv_plane"]["fetched_from_stores"] == SHARED
    assert report["prefix_hit_ratio"] == pytest.approx(0.49, abs=0.02)
    without = played(config(1, nodes=0), prompts(0, 10), *both_die(5.0)).report
    assert without["kv_plane"]["fetched_blocks"] == without["prefix_hit_ratio"] == 0


def test_the_directory_lags_behind() -> None:
    """A prompt that comes when the first one is just done does not find its end yet: news are gathered, a second at most."""
    assert 0 < played(config(), prompts(0, 2.75)).report["kv_plane"]["fetched_blocks"] < SHARED
    assert played(config(), prompts(0, 3.75)).report["kv_plane"]["fetched_blocks"] == SHARED


def test_a_directory_that_is_away_costs_a_miss_and_one_that_came_back_is_told_everything() -> None:
    away = played(config(), prompts(0, 10), Fault(9.0, "lose_directory", for_s=4.0)).report
    assert away["kv_plane"]["fetched_blocks"] == 0
    assert away["kv_plane"]["unanswered"] > 0
    emptied = played(config(), prompts(0, 20), Fault(5.0, "lose_directory", for_s=1.0)).report
    assert emptied["kv_plane"]["fetched_blocks"] == SHARED
    assert away["ttft_s"]["mean"] > emptied["ttft_s"]["mean"]


def test_a_store_that_dies_is_replaced_by_an_empty_one_that_is_offered_everything() -> None:
    worlds: list[World] = []
    deaths = (Fault(5.0, "kill", "store-0"), *both_die(30.0))
    report = played(config(1), prompts(0, 40), *deaths, prepare=worlds.append).report
    plane = worlds[0].site.plane
    assert plane is not None
    assert plane.stores["store-0"].epoch == 2
    assert report["kv_plane"]["fetched_from_stores"] == SHARED, "workers offered their blocks to the new store"
    lost = played(config(1), prompts(0, 10), *both_die(5.0), Fault(5.1, "kill", "store-0")).report
    assert lost["kv_plane"]["fetched_blocks"] == 0


@pytest.mark.parametrize("at_s", [10.0, 10.01, 10.02, 10.03])
def test_a_source_that_dies_while_it_is_read_brings_nothing(at_s: float) -> None:
    faults = [*both_die(5.0), Fault(at_s, "kill", "store-0")]
    assert played(config(1), prompts(0, 10), *faults).report["kv_plane"]["fetched_blocks"] == 0


def test_a_store_evicts_what_was_used_longest_ago_and_keeps_within_its_memory() -> None:
    arrivals = [Arrival(3.0 * n, 2560, 2, tuple(range(100 * n, 100 * n + 40)), 64) for n in range(8)]
    report = played(config(), arrivals).report
    assert report["kv_plane"]["taken_blocks"] > report["kv_plane"]["stored_blocks"] > 0
    assert report["kv_plane"]["stored_blocks"] <= 2**20 // (BLOCK * 100)


def test_everything_at_once_costs_misses_alone() -> None:
    faults = [
        Fault(2.0, "partition", "store-0", 3.0),
        Fault(4.0, "lose_directory", for_s=2.0),
        Fault(7.0, "kill", "store-1"),
        Fault(9.0, "notice", "store-0", 1.0),
        Fault(11.0, "slow", "store-0", 5.0, 0.01),
        Fault(12.0, "kill", "prefill-1"),
        Fault(14.0, "lose_directory", for_s=0.1),
    ]
    arrivals = prompts(*(0.8 * n for n in range(25)))
    result = played(config(nodes=2), arrivals, *faults)
    again = played(config(nodes=2), arrivals, *faults)
    assert result.report | {"wall_s": 0} == again.report | {"wall_s": 0}, "the same seed, the same report"
    assert not result.errors


def test_a_leak_in_a_store_and_a_directory_that_is_wrong_are_found() -> None:
    def leak(world: World) -> None:
        plane = world.site.plane
        assert plane is not None
        plane.stores["store-0"].inventory.allocate(1)

    def forget(world: World) -> None:
        plane = world.site.plane
        assert plane is not None
        gone = plane.stores["store-0"]
        plane.directory.table._remove(b"".join(entry.key for entry in gone.inventory.entries()), 2)

    for spoil, said in ((leak, "references, its holders have"), (forget, "the directory names")):
        with pytest.raises(BrokenRuleError, match=said):
            played(config(), prompts(0), prepare=lambda world, spoil=spoil: world.events.at(8.0, spoil, world))


def test_faults_name_stores_and_need_a_directory_to_lose(tmp_path: Any) -> None:
    path = tmp_path / "faults.yaml"
    path.write_text("[{at_s: 1, kind: kill, target: store-1}, {at_s: 2, kind: lose_directory, for_s: 3}]")
    assert [fault.kind for fault in read_faults(str(path), ["decode-0"], store_names(config(nodes=2)))] == [
        "kill",
        "lose_directory",
    ]
    with pytest.raises(ConfigError, match="no worker or store of this cluster; there are decode-0, store-0"):
        read_faults(str(path), ["decode-0"], store_names(config()))
    plain = config()
    plain = plain.model_copy(update={"sim": plain.sim.model_copy(update={"directory": False})})
    with pytest.raises(ConfigError, match=r"set sim\.directory"):
        played(plain, prompts(0), Fault(1.0, "lose_directory"))
