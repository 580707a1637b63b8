"""Who is refused early, who is held, who goes: tables on situations whose answer can be worked out by hand."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_policies import PROMPT, C, D, P, situation, worker

from core.config import RouterConfig
from core.cost_model import StepCost
from core.errors import OverloadedError, QuotaExceededError
from core.request import Slo
from router.attempt import JourneySpec
from router.early_rejection import Departures, Hold, Refusal, judge, quickest_s, relief_by_request_s
from router.order import Waiting
from router.policy import Candidate, Decision, Need, Nobody, Pair
from router.waiting_room import WaitingRoom
from tandem.sampling import SamplingParams

COST = StepCost(base_s=2e-3, prefill_token_s=1e-3, prefill_pair_s=0.0, decode_row_s=1e-3, decode_context_s=1e-6)
PAIR = Pair("p0", "d0")


def spec(request_id: str = "r", tokens: int = 10, **fields: object) -> JourneySpec:
    return JourneySpec(request_id, tuple(range(tokens)), SamplingParams(max_tokens=10, seed=1), **fields)  # type: ignore[arg-type]


def predicted(ttft_s: float = 0.1, gap_s: float = 0.02, tpot_s: float = 0.02) -> Candidate:
    return Candidate(PAIR, ttft_s, gap_s, 0.0, tpot_s=tpot_s)


def here(**of_decode: object):
    workers = (worker("p0", P), worker("d0", D, **of_decode), worker("c0", C))
    return situation(*(replace(one, step_cost=COST) for one in workers))


@pytest.mark.parametrize(
    ("slo", "deadline_s", "candidate", "leaving", "expected"),
    [
        (Slo(), None, predicted(99, 99, 99), 0, None),
        (Slo(ttft_s=1.5), None, predicted(0.4), 0, None),  # 1 s waited already
        (Slo(ttft_s=1.5), None, predicted(0.6), 0, "first token would take 1.6 s in all, the limit is 1.5 s"),
        (Slo(), 1.2, predicted(0.4), 0, "the limit is 1.2 s"),
        (Slo(tbt_s=0.02), None, predicted(), 0, None),
        (Slo(tbt_s=0.015), None, predicted(), 0, "slowest tenth of its token gaps would be 0.02 s, the limit is 0.015 s"),
        (Slo(tpot_s=0.015), None, predicted(), 0, "mean of its token gaps"),
        (Slo(tbt_s=0.015), None, predicted(), 5, None),  # when its prefill ends, five have left at 1 ms each
        (Slo(tbt_s=0.015), None, predicted(), 4, "slowest tenth"),
    ],
)  # fmt: skip
def test_limits_are_judged_for_the_time_when_prefill_ends(slo, deadline_s, candidate, leaving, expected):
    verdict = judge(1.0, 0.0, spec(slo=slo, deadline_s=deadline_s), candidate, lambda at: 1e-3 * leaving)
    if expected is None:
        assert verdict is None
    else:
        assert isinstance(verdict, Refusal)
        assert expected in verdict.reason
        assert 1.0 <= verdict.retry_after_s <= 60.0


def test_it_waits_while_that_may_still_change_and_no_longer():
    asked = spec(slo=Slo(ttft_s=2.0, tbt_s=0.015))
    verdict = judge(0.0, 0.0, asked, predicted(0.5), lambda at: 6e-3 if at > 1.2 else 0.0)
    assert isinstance(verdict, Hold)
    assert 0 < verdict.look_at <= 1.5, "its slack is 1.5 s"
    late = judge(1.4, 0.0, asked, predicted(0.5), lambda at: 6e-3 if at > 2.2 else 0.0)
    assert isinstance(late, Refusal), "with the slack that is left they will not have gone"


def test_departures_count_those_who_are_still_expected():
    departures = Departures()
    for number, at in enumerate((1.0, 2.0, 2.0, 9.0)):
        departures.expect(f"r{number}", "d0", at)
    departures.expect("other", "d1", 1.5)
    assert departures.between("d0", 0.0, 2.0) == 3
    assert departures.between("d0", 1.0, 2.0) == 2, "what was due and still runs says nothing"
    departures.expect("r1", "d1", 5.0)  # placed again elsewhere
    departures.gone("r2")
    departures.gone("r2")
    assert departures.between("d0", 0.0, 10.0) == 2
    assert departures.between("d1", 0.0, 10.0) == 2
    assert departures.between("nobody", 0.0, 10.0) == 0


@settings(deadline=None)
@given(seed=st.integers(0, 2**32))
def test_departures_agree_with_a_plain_list(seed):
    rng, departures, truth = random.Random(seed), Departures(), {}
    for _ in range(200):
        name = f"r{rng.randrange(20)}"
        if rng.random() < 0.5:
            truth[name] = (f"d{rng.randrange(3)}", float(rng.randrange(10)))
            departures.expect(name, *truth[name])
        else:
            truth.pop(name, None)
            departures.gone(name)
        where, now, until = f"d{rng.randrange(3)}", rng.randrange(10), rng.randrange(10)
        expected = sum(at == where and now < ends <= until for at, ends in truth.values())
        assert departures.between(where, now, until) == expected


def test_what_the_quickest_workers_need():
    need = Need(len(PROMPT), output_tokens=10)
    assert quickest_s(here(), need) == (pytest.approx(0.002 + 0.001 * len(PROMPT)), pytest.approx(10 * 0.003))
    assert quickest_s(situation(), need) == (0.0, 0.0)
    assert relief_by_request_s(here(running=4, context_tokens=400), PAIR) == pytest.approx(1e-3 + 1e-4)
    assert relief_by_request_s(here(), Pair(None, "gone")) == 0.0
    assert here().costs_known
    assert not situation(worker("p0", P), worker("d0", D)).costs_known


# ---- the room ----------------------------------------------------------------------------------------------------------


def room(max_queue: int = 10, **config: object) -> WaitingRoom:
    return WaitingRoom(RouterConfig.model_validate({"max_queue": max_queue, **config}))


def test_nobody_is_refused_by_guesses_or_when_admission_is_off():
    tight = spec(slo=Slo(ttft_s=0.001))
    decision = Decision(PAIR, (predicted(5.0),))
    assert isinstance(room(admission="reject").judge(tight, 0.0, decision, here(), 0.0), Refusal)
    assert room().judge(tight, 0.0, decision, here(), 0.0) is None
    guessing = situation(worker("p0", P), worker("d0", D))
    assert room(admission="reject").judge(tight, 0.0, decision, guessing, 0.0) is None
    assert room(admission="reject").judge(tight, 0.0, Decision(Nobody("full", True)), here(), 0.0) is None
    sibling = replace(tight, choice=1)
    assert room(admission="reject").judge(sibling, 0.0, decision, here(), 0.0) is None


def test_whose_turn_comes_too_late_is_refused_before_it_waits():
    waits = room(admission="reject", max_queue=100)
    for second in range(50):
        waits.queue.add(Waiting(f"w{second}"))
        waits._pace.accepted(second * 0.5)
    asked = spec(slo=Slo(ttft_s=5.0))
    refusal = waits.wait(asked, 0.0, here(), Need(10, now=0.0), urgent=False)
    assert isinstance(refusal, Refusal)
    assert "its turn comes in about" in refusal.reason
    assert "r" not in waits.queue
    assert refusal.retry_after_s == pytest.approx(50 * 0.5 - 5.0, rel=0.1)
    assert waits.wait(replace(asked, slo=Slo(ttft_s=50.0)), 0.0, here(), Need(10, now=0.0), urgent=False) is None
    assert waits.give_up_at("r") == pytest.approx(50.0 - 0.012)
    assert waits.wait(replace(asked, request_id="f"), 0.0, here(), Need(10, now=0.0), urgent=True) is None
    assert waits.give_up_at("f") == float("inf"), "a failover waits whatever happens"


def test_batch_work_yields_to_the_limits_of_others_until_it_has_waited_long():
    waits, batch = room(aging_s=20.0), spec("b", priority=-10)
    decision = Decision(PAIR, (predicted(0.1, gap_s=0.05),))
    assert waits.judge(batch, 0.0, decision, here(), 0.0) is None, "nobody else is here"
    chat = spec("chat", slo=Slo(ttft_s=1.0, tbt_s=0.05))
    waits.entered(chat)
    held = waits.judge(batch, 0.0, decision, here(), 0.0)
    assert isinstance(held, Hold)
    assert "others are held to 0.05 s" in held.reason
    assert waits.judge(batch, 0.0, Decision(PAIR, (predicted(0.1, gap_s=0.04),)), here(), 0.0) is None
    assert waits.judge(batch, 0.0, decision, here(), 20.0) is None
    assert waits.judge(replace(batch, priority=0), 0.0, decision, here(), 0.0) is None
    waits.left(chat)
    assert waits.judge(batch, 0.0, decision, here(), 0.0) is None


def test_who_is_held_says_nothing_of_how_fast_places_come_free():
    waits, batch = room(admission="reject"), spec("batch", priority=-10)
    waits.entered(spec("chat", slo=Slo(ttft_s=1.0, tbt_s=0.05)))
    assert isinstance(waits.judge(batch, 0.0, Decision(PAIR, (predicted(0.1, gap_s=0.05),)), here(), 0.0), Hold)
    assert waits.wait(batch, 0.0, here(), Need(10), urgent=False) is None
    for second in (0.0, 10.0, 20.0):  # somebody comes every ten seconds and finds a place at once
        waits.taken(spec(f"s{second}"), second, again=False)
    one, two = (spec(name, slo=Slo(ttft_s=1.0)) for name in ("one", "two"))
    assert waits.wait(one, 30.0, here(), Need(10, now=30.0), urgent=False) is None
    assert waits.wait(two, 30.0, here(), Need(10, now=30.0), urgent=False) is None, "its turn is near"
    waits.taken(one, 30.0, again=False)
    waits.taken(two, 34.0, again=False)
    late = waits.wait(spec("late", slo=Slo(ttft_s=0.1)), 34.0, here(), Need(10, now=34.0), urgent=False)
    assert late is None, "nobody of its class waits"
    busy = waits.wait(spec("later", slo=Slo(ttft_s=0.1)), 34.0, here(), Need(10, now=34.0), urgent=False)
    assert isinstance(busy, Refusal), "the last place that somebody waited for took 4 s to come free"


def test_service_is_charged_to_counter_and_quota():
    waits = room(tenants={"a": {"weight": 2.0, "tokens_per_s": 1.0, "burst_tokens": 12.0}, "b": {}})
    asked = spec(tenant="a")
    waits.check("a", "standard", 0.0)
    waits.taken(asked, 0.0, again=False)
    waits.taken(asked, 0.0, again=True)  # a failover computes it again at our cost
    waits.taken(replace(asked, request_id="r/1", choice=1), 0.0, again=False)  # its prompt is cached
    waits.generated("a", 5, 0.0)
    assert waits.counters.counter("a") == (10 + 2 * 5) / 2
    with pytest.raises(QuotaExceededError, match="tenant a has used up its quota of 1 tokens/s") as refused:
        waits.check("a", "standard", 0.0)
    assert refused.value.retry_after_s == pytest.approx(4.0)
    waits.check("b", "standard", 0.0)
    waits.check("a", "standard", 4.0)


def test_a_full_queue_says_when_to_come_again():
    waits = room(max_queue=1)
    waits.check("a", "standard", 0.0)
    waits.wait(spec(), 0.0, here(), Need(10), urgent=False)
    with pytest.raises(OverloadedError, match=r"1 requests wait already \(router.max_queue is 1\)") as refused:
        waits.check("a", "standard", 0.0)
    assert refused.value.retry_after_s >= 1.0


numbers = st.floats(allow_nan=True, allow_infinity=True)
costs = st.none() | st.builds(StepCost, numbers, numbers, numbers, numbers, numbers)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning", "ignore:overflow encountered:RuntimeWarning")
@settings(deadline=None)
@given(
    queue=st.sampled_from(["slack", "fcfs", "mlfq"]),
    drawn=st.lists(st.tuples(st.sampled_from([P, D, C]), st.integers(-5, 10**9), costs), max_size=4),
    slo=st.builds(Slo, *[st.none() | st.floats(1e-9, 1e9)] * 3),
    deadline_s=st.none() | st.floats(1e-9, 1e9),
    priority=st.integers(-20, 20),
    candidates=st.lists(st.builds(Candidate, st.just(PAIR), numbers, numbers, numbers, tpot_s=numbers), max_size=1),
    now=st.floats(0, 1e9),
)
def test_whatever_workers_report_everybody_is_placed_held_or_refused(queue, drawn, slo, deadline_s, priority, candidates, now):
    """No view makes it raise, and no delay it names is endless."""
    made = (worker(f"w{n}", role, running=load, step_cost=cost) for n, (role, load, cost) in enumerate(drawn))
    seen, waits = situation(*made), room(admission="reject", queue=queue)
    asked = spec(slo=slo, deadline_s=deadline_s, priority=priority)
    waits.entered(replace(asked, request_id="other", slo=Slo(tbt_s=0.01)))
    decision, need = Decision(PAIR, tuple(candidates)), Need(10, output_tokens=5, now=now)
    verdict = waits.judge(asked, now, decision, seen, now)
    if isinstance(verdict, Hold):
        assert now <= verdict.look_at <= now + 60
    refused = waits.wait(asked, now, seen, need, urgent=False)
    for refusal in (verdict, refused):
        if isinstance(refusal, Refusal):
            assert 1.0 <= refusal.retry_after_s <= 60.0
    if refused is None:
        assert waits.queue.head(now) == "r"
        waits.expect(asked, decision, need)
        waits.taken(asked, now, again=False)
    waits.left(asked)
    assert len(waits.queue) == 0
