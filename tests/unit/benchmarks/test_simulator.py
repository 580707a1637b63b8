"""The scripts that collect the simulator's figures: what is copied in is enough to run them, and their bars are met."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path

import pytest

from benchmarks import simulator, simulator_mooncake, simulator_papers, simulator_roofline, simulator_splitwise
from benchmarks.rows import Row


def test_rooflines_against_what_is_copied_in() -> None:
    rows = {row.id: row for row in simulator_roofline.rows(None)}
    assert rows["roofline.unseen"].verdict == "met"
    assert any("BLOOM" in name.upper() for name in rows)


def test_every_figure_of_the_papers_is_met() -> None:
    rows = [*simulator_papers.fastserve(), *simulator_papers.spotserve()]
    assert {row.verdict for row in rows} == {"met"}
    assert len(rows) == 4 + 2 + 7


def test_the_stored_example_is_exact() -> None:
    assert simulator_splitwise.stored_example().verdict == "met"


def test_lengths_without_a_data_folder_stay_within_the_quantiles() -> None:
    filled = simulator_splitwise._filled((1, *range(10, 34)))
    assert min(filled) >= 1
    assert max(filled) <= 33


def test_a_ticks_requests_are_spread_over_it(tmp_path: Path) -> None:
    lines = [
        json.dumps({"timestamp": at, "input_length": 600, "output_length": 5, "hash_ids": [0, n]})
        for n, at in enumerate((0, 0, 0, 3000, 6000))
    ]
    (tmp_path / "traces").mkdir()
    (tmp_path / simulator_mooncake.TRACE).write_bytes(gzip.compress("\n".join(lines).encode() + b"\n"))
    times = [one.arrival_s for one in simulator_mooncake.arrivals(tmp_path, 4, 2.0)]
    assert times == pytest.approx([0.0, 0.5, 1.0, 1.5])


def test_without_its_trace_mooncake_is_a_row_without_a_figure() -> None:
    assert [row.measured for row in simulator_mooncake.rows(None, quick=True)] == [None]


def test_a_script_that_is_missing_or_fails_is_a_row(tmp_path: Path) -> None:
    assert simulator.rows_of("no_such_part", None, True, tmp_path, time.monotonic() + 60)[0].verdict == "not measured"
    rows = simulator.rows_of("roofline", tmp_path / "nowhere", True, tmp_path, time.monotonic() + 60)
    assert rows[0].verdict == "not measured"
    assert "nowhere" in rows[0].how


def test_rows_of_several_scripts_are_collected() -> None:
    rows = list(simulator.collect(["roofline", "papers"], None, quick=True))
    assert all(isinstance(row, Row) for row in rows)
    assert {"roofline.unseen", "vtc.max"} <= {row.id for row in rows}
