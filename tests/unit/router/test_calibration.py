"""Corrections learned from outcomes: of the latest, per worker, bounded."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_placing import D, P, view, worker

from core.cost_model import StepCost
from core.request import AttemptTiming
from router.calibration import NO_CORRECTION, OUTCOMES_MIN, REMEMBERED, Calibration
from router.cost_columns import FACTOR_MAX
from router.facts import Facts
from router.forecast_pair import forecast
from router.goodput import Goodput
from router.policy import Candidate, Need, Pair
from router.pools import Pool
from router.situation import Situation
from router.view import NO_CLAIM, Claim, Claims

COST = StepCost(base_s=0.0, prefill_token_s=1e-3, prefill_pair_s=0.0, decode_row_s=1e-3, decode_context_s=0.0)
PAIR = Pair("p0", "d0")


def fared(computing_s: float = 0.2, overhead_s: float = 0.01, gap_s: float = 0.02, join_s: float = 0.005) -> Facts:
    """A request that arrived at 10, was decided on 0.5 s later, and had four tokens."""
    first_at = 10.5 + overhead_s + computing_s
    facts = Facts(10.0, first_token_at=first_at, second_token_at=first_at + gap_s + join_s, num_tokens=4)
    facts.last_token_at = first_at + join_s + 3 * gap_s
    facts.prefill = AttemptTiming(queue_s=computing_s / 4, prefill_s=computing_s * 3 / 4)
    return facts


def predicted(factor: float = 1.0) -> Candidate:
    """A chunk of 256 tokens is believed to take 0.256 s, a gap 10 ms, both times `factor`."""
    return Candidate(
        PAIR,
        0.1 * factor,
        0.01,
        0.0,
        queue_s=0.05 * factor,
        prefill_s=0.05 * factor,
        step_s=0.01 * factor,
        standard_chunk_s=0.256 * factor,
        standard_gap_s=1e-3 * factor,
    )


def test_what_the_cost_model_leaves_out_is_learned():
    known = Calibration()
    for number in range(OUTCOMES_MIN):
        assert known.of("p0") == NO_CORRECTION, f"{number} outcomes say nothing"
        known.observe(predicted(), 0.5, fared())
    assert known.of("p0") == pytest.approx((0.512, 0.0, 0.01, 0.0))
    assert known.of("d0") == pytest.approx((0.0, 2e-3, 0.0, 0.005))


def test_a_prediction_that_was_corrected_already_is_not_corrected_twice():
    known = Calibration()
    for _ in range(OUTCOMES_MIN):
        known.observe(predicted(), 0.5, fared())
        known.observe(predicted(2.0), 0.5, fared())
    assert (known.of("p0").chunk_s, known.of("d0").gap_s) == pytest.approx((0.512, 2e-3))


def test_one_odd_request_moves_nothing():
    known = Calibration()
    for _ in range(9):
        known.observe(predicted(), 0.5, fared())
    before = known.of("p0"), known.of("d0")
    known.observe(predicted(), 0.5, fared(computing_s=50.0, overhead_s=9.0, gap_s=7.0, join_s=8.0))
    assert (known.of("p0"), known.of("d0")) == before


def test_waiting_for_a_step_under_way_is_computing_and_not_the_way_there():
    known = Calibration()
    for number in range(REMEMBERED):
        facts = fared(overhead_s=0.11 if number % 3 else 0.01)  # of which the worker says nothing
        known.observe(predicted(), 0.5, facts)
    assert known.of("p0").overhead_s == pytest.approx(0.01)
    assert known.of("p0").chunk_s == pytest.approx(0.512 * 0.3 / 0.2), "most of them waited"


def test_what_was_long_ago_is_forgotten():
    known = Calibration()
    for _ in range(REMEMBERED):
        known.observe(predicted(), 0.5, fared())
    for _ in range(REMEMBERED):
        known.observe(predicted(), 0.5, fared(computing_s=0.1))
    assert known.of("p0").chunk_s == pytest.approx(0.256)


NUMBERS = st.one_of(st.floats(0, 1e6), st.sampled_from([0.0, 1e-12, 5e-309]))


@settings(deadline=None)
@given(st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS, NUMBERS), max_size=40))
def test_corrections_stay_sane_whatever_is_measured(outcomes):
    known = Calibration()
    for computing_s, overhead_s, gap_s, join_s, queue_s in outcomes:
        candidate = Candidate(PAIR, 0.0, 0.0, 0.0, queue_s=queue_s, prefill_s=gap_s, step_s=queue_s, standard_chunk_s=join_s)
        known.observe(candidate, 0.5, fared(computing_s, overhead_s, gap_s, join_s))
        for worker_id in ("p0", "d0"):
            assert all(0 <= value < math.inf for value in known.of(worker_id))
    for one, role in (("p0", P), ("d0", D)):
        pool = Pool([worker(one, role, step_cost=COST)], Claims(), calibration=known)
        for column, plain in zip(pool.cost, Pool([worker(one, role, step_cost=COST)], Claims()).cost, strict=True):
            assert (column <= plain * FACTOR_MAX).all()
            assert (column >= plain / FACTOR_MAX).all()


def test_corrections_reach_predictions():
    known = Calibration()
    for _ in range(OUTCOMES_MIN):
        known.observe(predicted(), 0.5, fared())
    workers = worker("p0", P, step_cost=COST), worker("d0", D, step_cost=COST)
    names = frozenset(("p0", "d0"))
    plain = forecast(Situation(view(*workers), names, Claims()), Need(100, output_tokens=51), PAIR)
    here = Situation(view(*workers), names, Claims(), calibration=known)
    better = next(one for one in Goodput().decide(here, Need(100, output_tokens=51)).candidates if one.pair == PAIR)
    assert plain is not None
    assert (plain.ttft_s, better.ttft_s) == pytest.approx((0.1, 0.2 + 0.01))
    assert (plain.step_s, better.step_s) == pytest.approx((1e-3, 2e-3))
    assert better.transfer_s - plain.transfer_s == pytest.approx(0.005)
    assert better.tpot_s == pytest.approx(better.step_s + better.transfer_s / 50)


def test_a_new_fit_that_knows_it_already_is_not_corrected_again():
    known = Calibration()
    for _ in range(OUTCOMES_MIN):
        known.observe(predicted(), 0.5, fared())
    for cost in (COST, COST.scaled(2.0), COST.scaled(3.0)):
        pool = Pool([worker("p0", P, step_cost=cost)], Claims(), calibration=known)
        assert pool.prefill_s(256.0) == pytest.approx([0.512])
        assert pool.standard_chunk_s == pytest.approx([0.512])


def test_prompts_ahead_count_one_by_one_less_what_is_done_of_the_first():
    claims = Claims()
    cost = StepCost(base_s=0.0, prefill_token_s=1e-3, prefill_pair_s=1e-6, decode_row_s=0.0, decode_context_s=0.0)
    for tokens in (100, 200):
        claims.swap(NO_CLAIM, Claim("p0", tokens, "d0", tokens), now=5.0)
    pool = Pool([worker("p0", P, step_cost=cost)], claims)
    each_s = [tokens * 1e-3 + tokens * (tokens + 1) / 2 * 1e-6 for tokens in (100, 200)]
    assert pool.queue_s(5.0) == pytest.approx([sum(each_s)])
    assert pool.queue_s(5.05) == pytest.approx([sum(each_s) - 0.05])
    assert pool.queue_s(99.0) == pytest.approx([each_s[1]]), "the first one is late, and the second has not begun"
    short = Claim("p0", 10, "d0", 10)
    claims.swap(NO_CLAIM, short, now=5.05)
    claims.swap(short, NO_CLAIM, now=5.1)  # cancelled in the line: the first one is where it was
    pool.refresh(("p0",))
    assert pool.queue_s(5.1) == pytest.approx([sum(each_s) - 0.1])
    claims.swap(Claim("p0", 100, "d0", 100), Claim(None, 0, "d0", 100), now=5.2)
    pool.refresh(("p0",))
    assert pool.queue_s(5.2) == pytest.approx([each_s[1]])
    assert pool.queue_s(5.3) == pytest.approx([each_s[1] - 0.1])


def test_work_of_others_is_what_reports_have_beyond_our_claims_of_then():
    claims = Claims()
    ours = Claim("p0", 100, "d0", 100)
    claims.swap(NO_CLAIM, ours)
    reported = worker("p0", P, waiting_tokens=150), worker("d0", D, running=3, context_tokens=400)
    here = Situation(view(*reported), frozenset(("p0", "d0")), claims, seen_at=20.0)
    claims.swap(ours, NO_CLAIM)  # after the report came
    assert here.prefill.waiting_tokens == pytest.approx([50])
    assert (here.decode.running, here.decode.context) == (pytest.approx([2]), pytest.approx([300]))
    assert here.prefill.queue_s(20.0) > 0
    assert here.prefill.queue_s(20.0) - here.prefill.queue_s(20.001) == pytest.approx([0.001])
    assert here.prefill.queue_s(1e6) == pytest.approx([0.0]), "their work goes on while we look at an old report"


def test_those_whose_prompts_are_being_computed_do_not_all_decode_at_once():
    claims = Claims()
    for number in range(40):
        claims.swap(NO_CLAIM, Claim("p0", 500, "d0", 500), now=float(number))
    workers = worker("p0", P, step_cost=COST), worker("d0", D, step_cost=COST, blocks_total=9999, blocks_free=9999)
    here = Situation(view(*workers), frozenset(("p0", "d0")), claims)
    few = Goodput().decide(here, Need(100, output_tokens=20, now=39.0)).candidates
    assert not few, "the window is full"
    one = forecast(here, Need(100, output_tokens=20, now=39.0), PAIR)
    assert one is not None
    assert one.step_s < 5e-3, "40 prompts of half a second each keep no 20 tokens of a millisecond waiting"
    burst = forecast(here, Need(100, output_tokens=20_000, now=39.0), PAIR)
    assert burst is not None
    assert burst.step_s == pytest.approx(41e-3), "long answers meet everybody"


def test_a_decode_worker_that_never_computed_a_prompt_is_not_thought_to_do_so_for_nothing():
    unlearned = StepCost(base_s=2e-3, prefill_token_s=0.0, prefill_pair_s=0.0, decode_row_s=1e-3, decode_context_s=0.0)
    workers = worker("p0", P, step_cost=COST), worker("d0", D, running=9, step_cost=unlearned)
    here = Situation(view(*workers), frozenset(("p0", "d0")), Claims())
    assert here.decode.cost.prefill_token_s == pytest.approx([1e-3])
    assert here.decode.cost.decode_row_s == pytest.approx([1e-3])
    assert Goodput().decide(here, Need(300, output_tokens=20)).place == PAIR
