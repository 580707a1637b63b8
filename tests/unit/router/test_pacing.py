"""The first token that waits for the second: when, for how long, and what the user sees of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from journey_script import DONE_PREFILL, GRANTED, JOINED, OPENED, RETRY, commands_of, new_journey, spell, tokens

from core.request import FinishReason, Slo
from router import events as ev
from router.journey import Journey
from router.pacing import HOLD_FROM, paced
from router.policy import Candidate, Decision, Need, Nobody, Pair
from router.ranking import NEAR

NOW = 100.0
HELD = ev.Placed("p", "d", hold_until=5.0)


def candidate(prefill: str | None = "p", ttft_s: float = 0.1, late_s: float = 0.02, step_s: float = 0.01) -> Candidate:
    """A hand-off that adds `late_s` to the first of some ten gaps."""
    gap_s, tpot_s = step_s + late_s, step_s + late_s / 10
    return Candidate(Pair(prefill, "d"), ttft_s, gap_s, 1.0, transfer_s=late_s, step_s=step_s, tpot_s=tpot_s)


def need(ttft_s: float | None = 1.0, tbt_s: float | None = 0.05, tpot_s: float | None = None) -> Need:
    return Need(100, slo=Slo(ttft_s, tbt_s, tpot_s), output_tokens=10, now=NOW)


def decision(*candidates: Candidate) -> Decision:
    return Decision(candidates[0].pair, candidates)


@pytest.mark.parametrize(
    ("asked", "chosen", "until"),
    [
        (need(), candidate(), NOW + NEAR),
        (need(ttft_s=0.5), candidate(), NOW + NEAR * 0.5),
        (need(ttft_s=None), candidate(), None),  # has tokens out, or nobody cares
        (need(tbt_s=None), candidate(), None),
        (need(tbt_s=None, tpot_s=0.05), candidate(), NOW + NEAR),
        (need(tbt_s=0.07), candidate(), None),  # far from its limit
        (need(), candidate(prefill=None), None),  # nothing is handed over
        (need(tbt_s=0.001), candidate(ttft_s=3.0), NOW + NEAR),  # predictions err: it may be in time
    ],
)  # fmt: skip
def test_who_is_kept_and_until_when(asked: Need, chosen: Candidate, until: float | None):
    assert paced(asked, decision(chosen)).hold_until == until


def test_what_is_predicted_of_a_first_token_that_is_kept():
    kept, whole = paced(need(), decision(candidate(), candidate(prefill=None))).candidates
    assert (kept.ttft_s, kept.held_s) == pytest.approx((0.13, 0.03))
    assert kept.gap_s == kept.tpot_s == 0.01
    assert whole == candidate(prefill=None)
    late = candidate(ttft_s=0.89)
    assert paced(need(), decision(late)).candidates == (late,), "it would miss its limit, so it is given as it comes"


def test_who_has_no_place_is_left_alone():
    nobody = Decision(Nobody("full", busy=True))
    assert paced(need(), nobody) is nobody


@given(
    before=st.builds(candidate, st.just("p"), st.floats(1e-3, 10), st.floats(0, 1), st.floats(1e-4, 1)),
    limit_s=st.floats(1e-3, 10),
    tbt_s=st.floats(1e-3, 1),
)
def test_keeping_it_is_never_predicted_to_miss_a_limit(before: Candidate, limit_s: float, tbt_s: float):
    made = paced(need(limit_s, tbt_s), decision(before))
    (after,) = made.candidates
    assert after.ttft_s <= max(before.ttft_s, limit_s)
    assert after.gap_s <= before.gap_s
    assert after.ttft_s == pytest.approx(before.ttft_s + after.held_s)
    assert made.hold_until is None or NOW < made.hold_until < NOW + limit_s
    assert (made.hold_until is not None) == (before.gap_s > HOLD_FROM * tbt_s)


# ---- what journeys do with it


def held_back() -> Journey:
    """Its first token came at 2 s, and is kept."""
    journey = new_journey()
    commands = commands_of(journey, ev.Woken(), HELD, GRANTED, OPENED, tokens("p", 0), DONE_PREFILL)
    assert "Deliver" not in spell(commands)
    assert journey.wake_at == 5.0
    return journey


def delivered(commands: list[ev.Command]) -> list[int]:
    return [token.position for command in commands if isinstance(command, ev.Deliver) for token in command.tokens]


def test_it_comes_with_the_second_and_what_follows_comes_at_once():
    journey = held_back()
    assert delivered(commands_of(journey, JOINED)) == []
    assert not journey.run_on(2.1, tokens("d", 1)), "somebody has to let it go"
    assert delivered(commands_of(journey, tokens("d", 1), now=2.1)) == [0, 1]
    assert journey.run_on(2.2, tokens("d", 2))
    facts = journey.facts
    assert (facts.first_ready_at, facts.first_token_at, facts.second_token_at) == (2.0, 2.1, 2.1)
    assert facts.timing(3.0).first_decode_s == pytest.approx(0.1), "what it was kept for is no mystery"
    assert journey.wake_at > 5.0


def test_it_is_given_when_it_may_be_kept_no_longer():
    journey = held_back()
    assert delivered(commands_of(journey, ev.Tick(), now=4.9)) == []
    assert delivered(commands_of(journey, ev.Tick(), now=5.0)) == [0]
    assert journey.facts.first_token_at == 5.0
    assert delivered(commands_of(journey, JOINED, tokens("d", 1), now=6.0)) == [1]


@pytest.mark.parametrize("event", [ev.WorkerLost("d"), ev.WorkerLost("p"), ev.AttemptFailed("d", 1, *RETRY)])
def test_it_is_given_before_another_place_is_sought(event: ev.Event):
    words = spell(commands_of(held_back(), event))
    assert words.startswith("Deliver")
    assert words.endswith("Place")


def test_an_answer_of_one_token_is_not_kept():
    journey = new_journey()
    words = spell(commands_of(journey, ev.Woken(), HELD, GRANTED, OPENED, tokens("p", 0, reason=FinishReason.STOP)))
    assert "Deliver" in words
    assert words.endswith("Finish")


def test_who_is_late_already_is_not_made_later():
    journey = new_journey()
    commands = commands_of(journey, ev.Woken(), ev.Placed("p", "d", hold_until=1.9), GRANTED, OPENED, tokens("p", 0))
    assert delivered(commands) == [0]


def test_an_end_gives_what_was_kept():
    words = spell(commands_of(held_back(), ev.ClientCancelled()))
    assert words.startswith("Deliver Cancel")
    assert words.endswith("Finish")
