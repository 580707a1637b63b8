"""The pure parts of the simulator's comparisons."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.simulator_fidelity import error, flat, wrong
from benchmarks.simulator_goodput import best, geometric_mean, ratio
from benchmarks.simulator_search import SHARE, STEP, Found, Task, bracketed
from benchmarks.simulator_spot import FOREVER_S, Kind, Outcome, Run, announced, machine_hours, mixed
from benchmarks.simulator_workloads import COPIED_WORKLOAD, Limits, Shape, Workload, config_of, excerpt, rate_of
from core.cost_model import StepCost
from core.errors import ConfigError
from core.latency import rate_at
from sim.faults import Fault
from sim.report_timeline import PoolSample, Sample, Timeline

LIMITS = Limits(1.0, 0.05, 0.04)
COST = StepCost(0.01, 5e-5, 1e-9, 1e-4, 1e-7)


@given(st.floats(0.1, 100), st.floats(0.1, 100))
def test_the_search_ends_near_the_rate_at_which_the_share_is_missed(guess: float, edge: float) -> None:
    points: list[tuple[float, float]] = []

    def attained(rate: float) -> float:
        points.append((rate, 1.0 if rate < edge else 0.5))
        return points[-1][1]

    bracketed(attained, guess, halvings=3)
    found = rate_at(points, SHARE)
    near = guess / STEP**8 <= edge <= guess * STEP**8
    if near and STEP**-7 < edge / guess < STEP**7:
        assert found is not None
        assert edge / STEP ** (1 / 4) <= found <= edge * STEP ** (1 / 4)
    assert len(points) <= 12


def found(rate: float, shape: Shape) -> Found:
    task = Task(COPIED_WORKLOAD, shape, "goodput", LIMITS, None, True, 1.0)
    return Found(task, ((rate, 1.0, 1.0, 1.0),))


def test_the_best_is_the_best_per_gpu() -> None:
    small, large = found(10.0, Shape(0, 0, 1, 256)), found(20.0, Shape(1, 1, 1, 256))
    assert best([large, small]) is small
    assert small.per_gpu == 2.5


def test_a_mean_of_ratios_needs_every_one_of_them() -> None:
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert geometric_mean([2.0, None]) is None
    assert geometric_mean([]) is None
    assert ratio(3.0, 0.0) is None


def test_copied_data_gives_a_workload_and_an_engine() -> None:
    requests = excerpt(COPIED_WORKLOAD, None, True)
    assert len(requests) == COPIED_WORKLOAD.quick_requests
    assert 0.8 < rate_of(requests) < 1.25
    config = config_of(Shape(1, 2, 0, 256, prefill_chunk=512), LIMITS, None)
    assert [(pool.role, pool.count, pool.max_step_tokens) for pool in config.sim.pools] == [
        ("prefill", 1, 512),
        ("decode", 2, 256),
    ]
    assert Path(config.sim.profile.file).exists() if config.sim.profile else False


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Kind.NOTICE, [("notice", 180.0, 120.0), ("add", 400.0, None)]),
        (Kind.SUDDEN, [("kill", 300.0, None), ("add", 400.0, None)]),
        (Kind.ORACLE, [("notice", 300.0, FOREVER_S), ("add", 400.0, None)]),
    ],
)
def test_a_machine_is_gone_when_the_trace_says_so(kind: Kind, expected: list[tuple[str, float, float | None]]) -> None:
    faults = [Fault(300.0, "notice", "decode-0", refill=False), Fault(400.0, "add", "decode-0")]
    assert [(one.kind, one.at_s, one.for_s) for one in announced(faults, kind)] == expected
    assert not announced(faults, kind)[0].refill


def test_a_notice_is_no_longer_than_the_time_before_it() -> None:
    (one,) = announced([Fault(50.0, "notice", "decode-0", refill=False)], Kind.NOTICE)
    assert (one.at_s, one.for_s) == (0.0, 50.0)


def test_machines_are_paid_while_they_are_up() -> None:
    def at(second: float, workers: int) -> Sample:
        return Sample(second, {"decode": PoolSample(workers, 0, 0, 0)}, 0, 0, 0)

    timeline = Timeline(samples=[at(0, 2), at(1800, 1), at(3600, 1), at(7200, 1)])
    assert machine_hours(timeline, 3600) == pytest.approx(1.5)


def test_goodput_per_dollar_is_of_the_market_and_the_machines_paid() -> None:
    def outcome(kind: Kind, hours: float) -> Outcome:
        return Outcome(Run(kind, "t", Path(), 4, 60.0, LIMITS), 100, 78, 39, 0, hours, 0)

    fixed, spot = outcome(Kind.ON_DEMAND, 2.0), outcome(Kind.NOTICE, 1.0)
    assert fixed.per_dollar(fixed) == pytest.approx(10.0)
    assert outcome(Kind.ORACLE, 9.0).per_dollar(spot) == spot.per_dollar(spot)


def test_instances_are_dealt_to_both_roles_in_turn() -> None:
    names = ["decode-0", "decode-1", "prefill-0", "prefill-1"]
    assert mixed(names) == ["prefill-0", "decode-0", "prefill-1", "decode-1"]


def test_wrong_cost_models_are_wrong_in_the_way_they_say() -> None:
    assert wrong("true", COST, 0) == COST
    assert wrong("half", COST, 0).prefill_s(1000) == pytest.approx(COST.prefill_s(1000) / 2)
    assert wrong("skewed", COST, 0) == wrong("half", COST, 1)
    assert wrong("skewed", COST, 1) == wrong("twice", COST, 0)
    assert flat(COST).prefill_s(10) == flat(COST).prefill_s(4000) > 0
    assert flat(COST).decode_s(100, 10_000) == flat(COST).decode_s(1, 1)


def test_an_error_is_relative_to_the_real_figure() -> None:
    assert error(1.1, 1.0) == pytest.approx(0.1)
    assert error(None, 1.0) is None
    assert error(1.0, 0.0) is None
    assert math.isclose(error(0.5, 1.0) or 0.0, -0.5)


def test_an_excerpt_may_begin_anywhere():
    first = excerpt(COPIED_WORKLOAD, None, True)
    later = excerpt(replace(COPIED_WORKLOAD, skip=100), None, True)
    assert later[0].arrival_s == 0.0
    assert [one.input_tokens for one in later[:300]] == [one.input_tokens for one in first[100:]]
    assert rate_of(later[:300]) == pytest.approx(rate_of(first[100:]))


def test_an_excerpt_behind_the_end_is_refused(tmp_path: Path):
    trace = tmp_path / "traces" / "few.csv"
    trace.parent.mkdir()
    trace.write_text("arrival_s,input_tokens,output_tokens\n0,10,5\n1,10,5\n2.5,10,5\n")
    few = Workload("few", "a few", "few.csv", 2)
    assert [one.arrival_s for one in excerpt(replace(few, skip=1), tmp_path, False)] == [0.0, 1.5]
    with pytest.raises(ConfigError, match="a few has no two requests after the first 2; skip fewer"):
        excerpt(replace(few, skip=2), tmp_path, False)
