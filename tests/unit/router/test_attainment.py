"""Which limits a request met: the definitions, and every request counted once."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.latency import Outcome, RequestTrace
from core.request import Slo
from router.attainment import Attainment, Felt, Gaps
from router.frontend_types import Timing
from tandem.errors import CancelledError, InternalError, InvalidRequestError, OverloadedError, TandemError

SLO = Slo(ttft_s=1.0, tbt_s=0.1, tpot_s=0.05)


@pytest.mark.parametrize(
    ("felt", "missed"),
    [
        (Felt(1.0, 0.1, 0.05), ()),
        (Felt(1.1, 0.1, 0.05), ("ttft",)),
        (Felt(1.0, 0.11, 0.05), ("tbt",)),
        (Felt(0.1, 0.01, 0.06), ("tpot",)),
        (Felt(2.0, 2.0, 2.0), ("ttft", "tbt", "tpot")),
        (Felt(0.5, None, None), ()),
        (Felt(None, None, None), ()),
    ],
)
def test_limits(felt: Felt, missed: tuple[str, ...]):
    assert felt.missed(SLO) == missed
    assert felt.missed(Slo()) == ()


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 10), st.integers(1, 4)), max_size=60), st.integers(1, 3))
def test_gaps_are_those_that_a_client_would_measure(deliveries: list[tuple[float, int]], first: int):
    gaps, now = Gaps(), 5.0
    gaps.joined(first - 1)
    seen = [now] * first
    for gap_s, tokens in deliveries:
        now += gap_s
        gaps.add(gap_s, tokens)
        seen += [now] * tokens
    trace = RequestTrace(0.0, now, Outcome.COMPLETED, tuple(seen))
    for ours, theirs in ((gaps.tbt_s, trace.tbt_s), (gaps.tpot_s, trace.tpot_s)):
        assert (ours is None) is (theirs is None)
        assert ours is None or math.isclose(ours, theirs or 0.0, rel_tol=1e-6, abs_tol=1e-9)


def test_the_slowest_choice_counts():
    slow, quick = Gaps(), Gaps()
    slow.add(0.2, 1)
    quick.add(0.01, 1)
    assert Felt.of(0.5, [quick, slow, Gaps()]) == Felt(0.5, 0.2, 0.2)
    assert Felt.of(None, [Gaps()]) == Felt(None, None, None)


def test_each_request_is_counted_once_and_each_missed_limit_too():
    counts = Attainment()
    counts.completed("interactive", SLO, Felt(0.5, 0.05, 0.01))
    counts.completed("interactive", SLO, Felt(0.5, 0.5, 0.5))
    counts.completed("", Slo(), Felt(99.0, 9.0, 9.0))
    counts.cancelled("batch")
    errors: list[TandemError] = [
        OverloadedError("full"),
        InternalError("ours"),
        InvalidRequestError("theirs"),
        CancelledError("slow"),
    ]
    for error in errors:
        counts.failed("batch", error)
    assert counts.outcomes == {
        ("interactive", "met"): 1,
        ("interactive", "tbt_missed"): 1,
        ("standard", "met"): 1,
        ("batch", "cancelled"): 2,
        ("batch", "rejected"): 1,
        ("batch", "failed"): 1,
    }
    assert +counts.violations == {("interactive", "tbt"): 1, ("interactive", "tpot"): 1}


def test_parts_of_a_hand_off_are_counted_of_hand_offs_alone():
    counts = Attainment()
    timing = Timing(queue_s=0.01, prefill_s=0.2, handoff_wait_s=0.003, transfer_s=0.02, first_decode_s=0.004)
    counts.spent(timing, split=True)
    counts.spent(Timing(queue_s=0.01, prefill_s=0.2), split=False)
    assert {part: histogram.count for part, histogram in counts.parts.items()} == {
        "queue": 2, "prefill": 2, "handoff_wait": 1, "transfer": 1, "first_decode": 1,
    }  # fmt: skip
