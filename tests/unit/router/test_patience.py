"""When the default policy lets a request wait beside free places, and when it must not."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from test_goodput import COST, SLO, loaded, workers
from test_policies import PROMPT, C, D, P, situation, worker

from core.request import Slo
from router.goodput import Goodput
from router.patience import GAP_FILLED, LULL_S, SOON_S
from router.policy import Decision, Need, Nobody, Pair
from router.pools import AHEAD_TOKENS
from router.view import NO_CLAIM, Claim, Claims


def decide(here, may_wait: bool = True, slo: Slo = SLO) -> Decision:
    return Goodput().decide(here, Need(len(PROMPT), slo=slo, output_tokens=50, may_wait=may_wait))


def waits(here, text: str, **how: object) -> Nobody:
    place = decide(here, **how).place  # type: ignore[arg-type]
    assert isinstance(place, Nobody)
    assert text in place.reason
    assert place.busy
    assert isinstance(decide(here, may_wait=False).place, Pair), "who may not wait goes"
    return place


def holding(*tokens: int) -> Claims:
    claims = Claims()
    for number, count in enumerate(tokens):
        claims.swap(NO_CLAIM, Claim(f"p{number}", count, "d0", count))
    return claims


def test_a_worker_gets_the_next_prompt_when_less_than_a_step_is_left():
    made = workers(worker("p0", P), worker("p1", P), worker("d0", D))
    little, much = AHEAD_TOKENS // 2, 2 * AHEAD_TOKENS
    assert decide(situation(*made, claims=holding(much, little)), slo=Slo()).place == Pair("p1", "d0")
    nobody = waits(situation(*made, claims=holding(much, much)), "prompts enough", slo=Slo())
    # prompts take 1 ms a token and 2 ms a chunk of 256
    assert abs(nobody.again_s - 1.032) < 1e-6, "until then nothing changes by itself"


def test_a_prompt_that_is_late_anyway_waits_until_it_delays_nobody():
    slow = Slo(ttft_s=0.1, tbt_s=0.02)  # its 160 tokens take 162 ms
    made = workers(worker("p0", P), worker("p1", P), worker("d0", D, running=3))
    assert decide(situation(*made), slo=slow).place == Pair("p0", "d0"), "nobody else is there"
    busy = situation(*made, claims=holding(2 * AHEAD_TOKENS, 0))
    assert waits(busy, "too late", slo=slow).again_s == LULL_S, "the other one is for who comes next"


def test_gaps_over_the_limit_are_waited_out():
    # 2 ms and 1 ms a request: the 20th makes gaps of 22 ms
    full = situation(*workers(worker("p0", P), worker("d0", D, running=20)))
    assert 0.018 < GAP_FILLED * 0.02 < 0.022
    waits(full, "gaps")
    assert decide(situation(*workers(worker("p0", P), worker("d0", D, running=15)))).place == Pair("p0", "d0")
    assert isinstance(decide(full, slo=Slo(ttft_s=1.0, tbt_s=0.002)).place, Pair), "nobody keeps it, even alone"
    alone = Slo(ttft_s=1.0, tbt_s=0.001)
    assert isinstance(decide(situation(*workers(worker("p0", P), worker("d0", D))), slo=alone).place, Pair), "never kept anyway"


def test_nobody_waits_for_costs_that_are_not_known():
    assert isinstance(decide(situation(worker("p0", P), worker("d0", D, running=500))).place, Pair)


loads = st.fixed_dictionaries(
    {"running": st.integers(0, 60), "waiting_tokens": st.integers(0, 5000), "speed": st.floats(0.5, 4.0)}
)


@settings(max_examples=100, deadline=None)
@given(
    prefills=st.lists(loads, max_size=4),
    decodes=st.lists(loads, max_size=4),
    wholes=st.lists(loads, max_size=3),
    ttft_s=st.none() | st.floats(0.001, 10.0),
    tbt_s=st.none() | st.floats(0.002, 0.2),
)
def test_who_waits_is_told_when_to_ask_again_and_an_idle_cluster_takes_everybody(prefills, decodes, wholes, ttft_s, tbt_s):
    kinds = (("p", P, prefills), ("d", D, decodes), ("c", C, wholes))
    made = [loaded(f"{letter}{n}", role, **one) for letter, role, some in kinds for n, one in enumerate(some)]
    slo = Slo(ttft_s=ttft_s, tbt_s=tbt_s)
    can = bool(wholes or (prefills and decodes))
    place = decide(situation(*made), slo=slo).place
    if isinstance(place, Nobody) and can:
        assert place.busy
        assert place.again_s >= SOON_S
    idle = [replace(one, running=0, waiting_tokens=0, context_tokens=0, step_cost=COST) for one in made]
    assert isinstance(decide(situation(*idle), slo=slo).place, Pair) == can
