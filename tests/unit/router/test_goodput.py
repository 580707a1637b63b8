"""The default policy on situations whose answer can be worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_policies import KEYS, PROMPT, C, D, P, situation, worker

from core.cost_model import StepCost
from core.request import Slo, WorkerRole
from router.calibration import Calibration, Correction
from router.forecast import Split, Whole
from router.forecast_columns import ASKING_S
from router.goodput import Goodput
from router.policy import Decision, Need, Pair, window_open
from router.ranking import Goal
from router.view import ASSUMED_LINK, NO_CLAIM, Claim, Claims, WorkerView

COST = StepCost(base_s=2e-3, prefill_token_s=1e-3, prefill_pair_s=0.0, decode_row_s=1e-3, decode_context_s=0.0)
SLO = Slo(ttft_s=1.0, tbt_s=0.02)


def decide(here, **need: object) -> Decision:
    return Goodput().decide(here, Need(len(PROMPT), keys=KEYS, slo=SLO, output_tokens=50, **need))  # type: ignore[arg-type]


def workers(*made):
    return tuple(replace(one, step_cost=COST) for one in made)


def test_the_shortest_time_to_the_first_token_with_the_prefix_counted():
    here = situation(*workers(worker("p0", P), worker("p1", P, waiting_tokens=50), worker("d0", D)), cached={"p1": 9})
    first = decide(replace(here, fetches=False)).candidates[0]
    assert first.pair == Pair("p1", "d0"), "16 tokens behind 50 are done before 160 behind none"
    assert first.ttft_s == pytest.approx(0.002 + 0.050 + 0.002 + 0.016)


def test_an_idle_worker_that_fetches_goes_before_a_busy_holder_and_after_an_idle_one():
    busy, idle = worker("p1", P, waiting_tokens=50), worker("p1", P)
    here = situation(*workers(worker("p0", P), busy, worker("d0", D, running=1)), cached={"p1": 9})
    first = decide(here).candidates[0]
    fetch_s = ASKING_S + ASSUMED_LINK.latency_s + 144 * here.token_bytes / ASSUMED_LINK.bytes_per_s
    assert first.pair == Pair("p0", "d0")
    assert (first.queue_s, first.prefill_s) == pytest.approx((fetch_s, 0.002 + 0.016)), "then it is a holder too"
    here = situation(*workers(worker("p0", P), idle, worker("d0", D, running=1)), cached={"p1": 9})
    assert decide(here).place == Pair("p1", "d0")


def test_what_is_on_its_way_to_be_computed_cannot_be_fetched():
    here = situation(*workers(worker("p0", P), worker("p1", P, waiting_tokens=50), worker("d0", D, running=1)))
    assert here.index is not None
    here.index.expect("p1", KEYS[:9], now=0.0)
    assert decide(here).place == Pair("p1", "d0"), "who will have it by then"


def test_gaps_are_kept_within_the_limit_even_on_the_busier_side():
    here = situation(*workers(worker("p0", P), worker("d0", D, running=30), worker("d1", D, running=3)))
    assert decide(here).place == Pair("p0", "d1")


def test_nobody_is_pushed_over_the_limit_while_another_place_is_left():
    # d0 runs 17 requests at 19 ms a token, little over 0.9 · 20 ms: one more costs more than one of them its limit, as far as
    # can be expected. d1 is so far over it that it has nobody to lose.
    here = situation(*workers(worker("p0", P), worker("d0", D, running=17), worker("d1", D, running=80)))
    assert decide(here).place == Pair("p0", "d1"), "one miss rather than more of eighteen"


def test_a_worker_just_over_the_limit_is_not_given_up():
    # Its requests may yet make it, as predictions go: to send it whoever comes would see to it that they do not.
    here = situation(*workers(worker("p0", P), worker("d0", D, running=17), worker("d1", D, running=18)))
    assert decide(here).place == Pair("p0", "d0")


def test_a_short_uncached_rest_goes_straight_to_an_idle_decode_worker():
    here = situation(*workers(worker("p0", P, waiting_tokens=400), worker("d0", D)), cached={"d0": 9})
    assert decide(here).place == Pair(None, "d0")


def test_a_long_prompt_goes_to_an_idle_decode_worker_only_when_the_pair_would_miss_a_limit():
    for waiting, place in ((0, Pair("p0", "d0")), (1000, Pair(None, "d0"))):
        here = situation(*workers(worker("p0", P, waiting_tokens=waiting), worker("d0", D)))
        assert decide(here).place == place


def test_a_short_prompt_goes_straight_where_joining_takes_longer_than_computing_it_and_a_prefill_worker_is_busy():
    class SlowToJoin(Calibration):
        def of(self, worker: str) -> Correction:
            return Correction(join_s=0.02)

    for tokens, waiting, place in ((16, 0, Pair("p0", "d0")), (16, 8, Pair(None, "d0")), (32, 8, Pair("p0", "d0"))):
        here = situation(*workers(worker("p0", P, waiting_tokens=waiting), worker("d0", D)))
        here = replace(here, calibration=SlowToJoin())
        assert Goodput().decide(here, Need(tokens, slo=SLO, output_tokens=50)).place == place


def test_what_is_cached_on_both_sides_is_handed_over_and_what_only_decode_has_is_computed_there():
    for at_prefill, place in ((9, Pair("p0", "d0")), (0, Pair(None, "d0"))):
        here = situation(*workers(worker("p0", P), worker("d0", D)), cached={"p0": at_prefill, "d0": 9})
        assert decide(replace(here, fetches=False)).place == place


def test_a_long_prompt_does_not_stall_a_decode_worker_that_has_streams():
    here = situation(*workers(worker("p0", P), worker("d0", D, running=10)))
    assert decide(here).place == Pair("p0", "d0")


def test_a_colocated_worker_is_taken_when_it_keeps_the_limits_and_the_pair_does_not():
    here = situation(*workers(worker("p0", P, waiting_tokens=3000), worker("d0", D, running=60), worker("c0", C)))
    assert decide(here).place == Pair(None, "c0")


def test_memory_for_the_whole_answer_is_looked_for():
    full = worker("d0", D, blocks_free=5, running=4)
    here = situation(*workers(worker("p0", P), full, worker("d1", D, running=5)))
    assert decide(here).place == Pair("p0", "d1")
    assert decide(situation(*workers(worker("p0", P), full))).place == Pair("p0", "d0"), "if there is none, ask all the same"


def test_without_limits_the_quickest_whole_request_wins():
    here = situation(*workers(worker("p0", P), worker("d0", D, running=9), worker("d1", D, running=1)))
    assert Goodput().decide(here, Need(160, keys=KEYS, output_tokens=50)).place == Pair("p0", "d1")


def test_candidates_say_why():
    here = situation(*workers(worker("p0", P, waiting_tokens=2000), worker("d0", D, running=60)))
    reasons = {candidate.reason for candidate in decide(here).candidates}
    assert any("at risk" in reason for reason in reasons)


loads = st.fixed_dictionaries(
    {"running": st.integers(0, 60), "waiting_tokens": st.integers(0, 5000), "speed": st.floats(0.5, 4.0)}
)


def loaded(name: str, role: WorkerRole, running: int, waiting_tokens: int, speed: float) -> WorkerView:
    load = {"running": running, "context_tokens": 100 * running} if role is D else {"waiting_tokens": waiting_tokens}
    return worker(name, role, step_cost=COST.scaled(speed), **load)


@settings(max_examples=150, deadline=None)
@given(
    prefills=st.lists(loads, min_size=1, max_size=14),
    decodes=st.lists(loads, min_size=1, max_size=14),
    ttft_s=st.none() | st.floats(0.05, 10.0),
    tbt_s=st.none() | st.floats(0.002, 0.2),
    claimed=st.lists(st.tuples(st.integers(0, 13), st.integers(0, 13)), max_size=12),
    answer=st.integers(1, 400),
)
def test_no_pair_is_better_than_the_one_that_was_found(prefills, decodes, ttft_s, tbt_s, claimed, answer):
    """Few rows of either side are ranked one by one: the best of all pairs is among them."""
    made = [loaded(f"p{n:02}", P, **one) for n, one in enumerate(prefills)]
    made += [loaded(f"d{n:02}", D, **one) for n, one in enumerate(decodes)]
    claims = Claims()
    for p, d in claimed:
        claims.swap(NO_CLAIM, Claim(f"p{p % len(prefills):02}", 300, f"d{d % len(decodes):02}", 300))
    here = situation(*made, claims=claims)
    need = Need(1000, slo=Slo(ttft_s=ttft_s, tbt_s=tbt_s), output_tokens=answer)
    goal, open_rows = Goal.of(need), window_open(here.prefill, need.tokens).nonzero()[0]
    rows = np.arange(len(decodes))
    split, alone = Split(here, here.prefill, here.decode, need, goal), Whole(here, here.decode, need, goal)
    pairs = [split.best(open_rows[p : p + 1], rows[d : d + 1], goal)[0] for p in range(open_rows.size) for d in rows]
    if not pairs:
        return
    best, found = min(pairs, key=lambda one: one.rank), Goodput().decide(here, need).candidates[0]
    if found.pair.prefill is not None:
        assert found == best.candidate()
    else:
        (quickest,) = [one for d in rows if (one := alone.best(rows[d : d + 1], goal)[0]).candidate() == found]
        assert quickest.rank < best.rank
