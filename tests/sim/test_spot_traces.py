"""Traces of spot instances: what they do to workers, what is refused and where."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.config import Config
from core.errors import ConfigError
from sim.cluster import spot_names
from sim.faults import as_recorded, read_faults
from sim.run import simulate
from sim.sweep import MODEL
from sim.workload import Arrival

WORKERS = ["prefill-0", "decode-0", "decode-1"]


def faults_of(tmp_path: Path, text: str, workers: list[str] = WORKERS):
    path = tmp_path / "spot.csv"
    path.write_text(text)
    return [(fault.at_s, fault.kind, fault.target) for fault in read_faults(str(path), workers)]


def test_of_a_drop_in_numbers_those_are_taken_that_were_there_longest(tmp_path: Path) -> None:
    counts = "t_s,live_instances\n0,3\n100,1\n200,2\n300,2\n400,0\n"
    assert faults_of(tmp_path, counts) == [
        (100.0, "notice", "prefill-0"), (100.0, "notice", "decode-0"), (200.0, "add", "prefill-0"),
        (400.0, "notice", "decode-1"), (400.0, "notice", "prefill-0"),
    ]  # fmt: skip


def test_a_mark_of_order_and_windows_line_ends_do_not_matter(tmp_path: Path) -> None:
    text = "\ufefftime_ms,event,node\r\n0,add,a\r\n5000,remove,a\r\n7000,DONE,\r\n9000,remove,b\r\n"
    assert faults_of(tmp_path, text) == [(5.0, "notice", "prefill-0")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("time_ms,event,node\n0,add,a\nsoon,remove,a\n", r"row 2 \(line 3\), column time_ms: 'soon' is no time"),
        ("time_ms,event,node\nnan,add,a\n", r"row 1 \(line 2\), column time_ms: 'nan' is no time"),
        ("time_ms,event,node\n-5,add,a\n", "column time_ms: '-5' is no time of 0 or more"),
        ("time_ms,event,node\n5000,add,a\n1000,remove,a\n", "1 s comes after 5 s; sort the file"),
        ("time_ms,event,node\n0,explode,a\n", "column event: 'explode' is none of add, remove"),
        ("time_ms,event,node\n0,add,\n", "column node: which instance"),
        ("time_ms,event,node\n0\n", "column event: '' is none of"),
        ("t_s,live_instances\n0,many\n", "column live_instances: 'many' is no number"),
        ("t_s,live_instances\n0,-3\n", "column live_instances: '-3' is no number"),
        ("t_s,live_instances\ninf,3\n", "column t_s: 'inf' is no time"),
    ],
)
def test_rows_that_cannot_be_are_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        faults_of(tmp_path, text)


def config(markets: tuple[str, str], **more: object) -> Config:
    pools = [
        {"role": "prefill", "count": 1, "usd_per_gpu_hour": 3600.0},
        {"role": "decode", "count": 1, "usd_per_gpu_hour": 3600.0, "market": markets[0]},
        {"role": "decode", "count": 2, "usd_per_gpu_hour": 3600.0, "market": markets[1]},
    ]
    engine = {"block_size": 16, "kv_bytes": "4MiB", "max_running": 16, "max_step_tokens": 128}
    return Config.model_validate({"engine": engine, "sim": {"pools": pools, "notice_s": 2.0, "start_s": 0.0, **more}})


def test_only_workers_of_spot_markets_are_taken_where_there_are_any() -> None:
    assert spot_names(config(("on_demand", "spot"))) == ["decode-1", "decode-2"]
    assert spot_names(config(("on_demand", "on_demand"))) == ["prefill-0", "decode-0", "decode-1", "decode-2"]


def test_who_is_taken_away_is_gone_when_the_trace_says_so_and_costs_nothing_until_another_comes(tmp_path: Path) -> None:
    path = tmp_path / "spot.csv"
    path.write_text("time_ms,event,node\n0,add,a\n0,add,b\n4000,remove,a\n7000,add,c\n")
    spot = config(("on_demand", "spot"))
    faults = as_recorded(read_faults(str(path), WORKERS, (), spot_names(spot)), spot.sim.notice_s)
    assert [(fault.at_s, fault.kind, fault.target, fault.for_s) for fault in faults] == [
        (2.0, "notice", "decode-1", 2.0), (7.0, "add", "decode-1", None),
    ]  # fmt: skip
    arrivals = [Arrival(0.1 * n, 64, 8) for n in range(100)]
    whole = simulate(spot, arrivals, seed=1, model=MODEL).report
    taken = simulate(spot, arrivals, seed=1, faults=faults, checks=True, model=MODEL).report
    assert whole["cost_usd"] == pytest.approx(4 * whole["duration_s"])
    assert taken["cost_usd"] == pytest.approx(4 * taken["duration_s"] - 3.0, abs=0.1), "away from 4 s to 7 s"
    assert taken["completed"] == len(arrivals)
