"""The closed forms against a queue that is played out, and against each other."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.closed_forms import crossing_rps, pipeline_ttft_s, single_ttft_s, tensor_ttft_s, wait_s, wait_within
from core.errors import ConfigError

ARRIVALS = 400_000


def played_ttft_s(rate_rps: float, stages_s: Sequence[float], seed: int = 1) -> float:
    """Mean time through a tandem of servers in arrival order: a stage begins when its input and the stage itself are free."""
    at = np.cumsum(np.random.default_rng(seed).exponential(1 / rate_rps, ARRIVALS))
    done = at
    for stage_s in stages_s:
        # done[n] = max(in[n], done[n - 1]) + s, unrolled: the largest of in[k] + (n - k + 1) s over k ≤ n
        steps = stage_s * np.arange(ARRIVALS)
        done = np.maximum.accumulate(done - steps) + steps + stage_s
    return float(np.mean(done - at))


@pytest.mark.parametrize("load", [0.1, 0.5, 0.8])
def test_the_three_forms_agree_with_a_played_queue_within_two_percent(load: float) -> None:
    service_s, speedup = 0.12, 1.6
    rate = load / service_s
    assert single_ttft_s(rate, service_s) == pytest.approx(played_ttft_s(rate, [service_s]), rel=0.02)
    rate = load * 2 / service_s
    assert pipeline_ttft_s(rate, service_s) == pytest.approx(played_ttft_s(rate, [service_s / 2] * 2), rel=0.02)
    rate = load * speedup / service_s
    assert tensor_ttft_s(rate, service_s, speedup) == pytest.approx(played_ttft_s(rate, [service_s / speedup]), rel=0.02)


def test_tensors_win_at_low_rates_and_the_pipeline_at_high_ones() -> None:
    service_s = 0.1
    crossing = crossing_rps(service_s, 1.5)
    assert 0 < crossing < 1.5 / service_s
    assert tensor_ttft_s(crossing * 0.9, service_s, 1.5) < pipeline_ttft_s(crossing * 0.9, service_s)
    assert tensor_ttft_s(crossing * 1.1, service_s, 1.5) > pipeline_ttft_s(crossing * 1.1, service_s)
    assert crossing_rps(service_s, 1.3) < crossing, "a lower speed-up moves the crossing to the left"
    assert crossing_rps(service_s, 2.0) == math.inf


@given(load=st.floats(0.01, 0.98), service_s=st.floats(1e-3, 10.0))
def test_the_general_wait_is_the_special_one(load: float, service_s: float) -> None:
    mean = wait_s(load, service_s, arrival_cv2=1.0, service_cv2=0.0)
    assert service_s + mean == pytest.approx(single_ttft_s(load / service_s, service_s))
    many = [wait_s(load, service_s, 1.0, 0.0, servers) for servers in (1, 2, 4, 8)]
    assert many == sorted(many, reverse=True), "more servers at the same load never make one wait longer"
    shares = [wait_within(limit * service_s, mean, load) for limit in (0.0, 0.5, 1.0, 8.0)]
    assert shares[0] == pytest.approx(1 - load)
    assert shares == sorted(shares)


def test_a_wait_of_nothing_and_of_for_ever() -> None:
    assert wait_s(1.0, 1.0, 1.0, 1.0) == math.inf
    assert (wait_s(0.0, 1.0, 1.0, 1.0), wait_within(0.0, 0.0, 0.0), wait_within(-0.1, 1.0, 0.5)) == (0.0, 1.0, 0.0)
    assert wait_within(5.0, math.inf, 1.0) == 0.0


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: single_ttft_s(10.0, 0.1), "fewer than 10"),
        (lambda: pipeline_ttft_s(21.0, 0.1), "fewer than 20"),
        (lambda: tensor_ttft_s(16.0, 0.1, 1.5), "fewer than 15"),
        (lambda: tensor_ttft_s(1.0, 0.1, 2.5), "between 1 and 2"),
        (lambda: single_ttft_s(-1.0, 0.1), "0 or more"),
    ],
)
def test_what_cannot_be_served_is_said(call: object, says: str) -> None:
    assert callable(call)
    with pytest.raises(ConfigError, match=says):
        call()
