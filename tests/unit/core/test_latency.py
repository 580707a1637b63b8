"""What users felt, and what a run adds up to."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.latency import Outcome, RequestTrace, percentile, rate_at, spread, summarize
from core.request import Slo

DONE, REJECTED, FAILED = Outcome.COMPLETED, Outcome.REJECTED, Outcome.FAILED


def trace(*token_s: float, start: float = 0.0, outcome: Outcome = DONE) -> RequestTrace:
    return RequestTrace(start, token_s[-1] if token_s else start + 1.0, outcome, token_s)


def test_one_request_as_its_user_felt_it() -> None:
    request = trace(1.0, 1.1, 1.2, 1.7, start=0.5)
    assert request.ttft_s == 0.5
    assert request.gaps_s == pytest.approx((0.1, 0.1, 0.5))
    assert request.tpot_s == pytest.approx(0.7 / 3)
    assert request.tbt_s == pytest.approx(0.5), "the slowest tenth of three gaps is one gap"


def test_the_slowest_tenth_is_rounded_up() -> None:
    gaps = [0.1] * 19 + [0.9, 0.7]
    times = [0.0]
    for gap in gaps:
        times.append(times[-1] + gap)
    assert trace(*times).tbt_s == pytest.approx((0.9 + 0.7 + 0.1) / 3)


def test_a_request_without_a_gap_has_met_any_limit_on_gaps() -> None:
    request = trace(0.2)
    assert (request.tpot_s, request.tbt_s) == (None, None)
    assert summarize([request], Slo(tbt_s=0.001, tpot_s=0.001), 1.0)["attainment"]["tbt"] == 1.0


def test_a_refused_request_has_met_nothing() -> None:
    request = trace(outcome=REJECTED)
    assert set(summarize([request], Slo(), 1.0)["attainment"].values()) == {0.0}


def test_a_run_is_judged_over_all_that_arrived() -> None:
    stalled = trace(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 2.0)  # one stall, hidden by the mean
    traces = [trace(0.1, 0.2), trace(3.0, 3.1), stalled, trace(outcome=REJECTED), trace(0.1, outcome=FAILED)]
    report = summarize(traces, Slo(ttft_s=1.0, tbt_s=0.3, tpot_s=0.3), duration_s=2.0)
    assert (report["requests"], report["completed"], report["rejected"], report["failed"]) == (5, 3, 1, 1)
    assert report["attainment"] == {"ttft": 0.4, "tbt": 0.4, "tpot": 0.6, "joint": 0.2, "joint_mean": 0.4}
    assert report["goodput_rps"] == 0.5
    assert report["goodput_mean_rps"] == 1.0
    assert report["output_tokens_per_s"] == (2 + 2 + 11 + 1) / 2


def test_an_empty_run_has_no_percentiles_and_does_not_divide_by_zero() -> None:
    report = summarize([], Slo(ttft_s=1.0), duration_s=0.0)
    assert report["ttft_s"] == {"p50": None, "p90": None, "p99": None, "mean": None}
    assert report["goodput_rps"] == 0.0


@given(st.lists(st.floats(0.0, 1e6), min_size=2, max_size=200))
def test_percentiles_agree_with_the_standard_library(values: list[float]) -> None:
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    ordered = sorted(values)
    for percent in (50, 90, 99):
        assert percentile(ordered, percent) == pytest.approx(cuts[percent - 1], rel=1e-9, abs=1e-9)
    assert spread(values)["p50"] == pytest.approx(statistics.median(values))


@pytest.mark.parametrize(
    ("points", "found"),
    [
        ([], None),
        ([(1, 0.89), (2, 1.0)], None),
        ([(1, 1.0), (2, 0.95)], 2),
        ([(1, 1.0), (4, 0.8)], 2),
        ([(4, 0.8), (1, 1.0)], 2),
        ([(1, 0.9), (4, 0.8), (8, 1.0)], 1),
        ([(1, 1.0), (2, 0.9), (4, 0.9), (8, 0.0)], 4),
    ],
)
def test_the_rate_up_to_which_a_share_is_attained(points: list[tuple[float, float]], found: float | None) -> None:
    assert rate_at(points) == (None if found is None else pytest.approx(found))


@given(points=st.lists(st.tuples(st.floats(0.01, 1e4), st.floats(0, 1)), max_size=9, unique_by=lambda point: point[0]))
def test_that_rate_lies_between_measured_ones(points: list[tuple[float, float]]) -> None:
    found = rate_at(points)
    if found is not None:
        met = [rate for rate, attained in points if attained >= 0.9]
        assert min(rate for rate, _ in points) <= found * (1 + 1e-9)
        assert any(rate <= found * (1 + 1e-9) for rate in met)
