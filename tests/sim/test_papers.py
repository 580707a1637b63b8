"""Figures of papers that the shipped queue must give: VTC's bound, FastServe's toy example."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import fastserve_toy, vtc_bound
from benchmarks.fastserve_toy import PUBLISHED, latencies
from router.order import Mlfq, Waiting


@pytest.mark.parametrize("schedule", PUBLISHED)
def test_fastserves_toy_example(schedule: str) -> None:
    digits = len(f"{PUBLISHED[schedule]:g}".partition(".")[2])
    assert round(latencies()[schedule], digits) == PUBLISHED[schedule]


def test_skipping_levels_keeps_a_long_prompt_from_the_front() -> None:
    order = Mlfq()
    for name, prefill_s in (("long", 0.15), ("short", 0.02)):
        order.add(Waiting(name, prefill_s=prefill_s))
    assert order.first(0.0) == "short"
    order.discard("short")
    assert order.first(0.0) == "long"
    assert fastserve_toy.JOBS[0].prefill > fastserve_toy.JOBS[1].prefill


@settings(deadline=None, max_examples=5)
@given(seed=st.integers(0, 2**32))
def test_two_clients_with_work_are_served_within_the_bound(seed: int) -> None:
    played = vtc_bound.play(fair=True, seconds=180, seed=seed)
    assert len(played.gaps) > 1000
    assert max(played.gaps) <= vtc_bound.BOUND
    assert played.counters <= vtc_bound.BOUND / 2, "counters stay within U"


def test_first_come_lets_the_difference_grow_without_bound() -> None:
    fair, line = (vtc_bound.play(fair, 360, seed=0) for fair in (True, False))
    assert line.gaps[-1] > vtc_bound.BOUND
    assert line.growth == pytest.approx(2, rel=0.2), "with time"
    assert fair.gaps[-1] < line.gaps[-1] / 50
    assert fair.tokens_per_s == pytest.approx(line.tokens_per_s, rel=0.02), "at no cost"
