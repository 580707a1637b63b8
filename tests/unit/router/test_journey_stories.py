"""What a journey does in the cases that matter, one by one: failover, order, refusals, deadlines, time spent."""

from __future__ import annotations

import pytest
from journey_script import (
    GRANTED,
    JOINED,
    OPENED,
    PAIR,
    PROMPT,
    RETRY,
    commands_of,
    journey_in,
    new_journey,
    spell,
    ticket,
    tokens,
)

from core.errors import (
    DeadlineExceededError,
    OutOfBlocksError,
    OverloadedError,
    TransferError,
    UnavailableError,
)
from core.request import AttemptKey, AttemptTiming, FinishReason
from router import events as ev
from router.journey import State
from router.view import NO_CLAIM, Claim


def test_the_next_attempt_starts_from_the_tokens_delivered_so_far():
    journey = journey_in(State.DECODING)
    commands_of(journey, tokens("d", 1, 2))
    assert commands_of(journey, ev.WorkerLost("d")) == [ev.Place(frozenset({"d"}))]
    [reserve] = commands_of(journey, ev.Placed("p", "e"))
    assert isinstance(reserve, ev.SendReserve)
    item = reserve.item
    assert item.token_ids == (*PROMPT, 100, 101, 102)
    assert (item.prompt_len, item.position, item.key) == (3, 3, AttemptKey("r", 2))
    assert (item.sampling.stop, item.sampling.n, item.sampling.seed) == ((), 1, 1)
    delivered = commands_of(
        journey,
        ev.Reserved("e", 2, True),
        ev.Opened("p", 2, ticket(2)),
        tokens("p", 2, 3, attempt=2),
        tokens("e", 4, attempt=2),
    )
    positions = [t.position for c in delivered if isinstance(c, ev.Deliver) for t in c.tokens]
    assert positions == [3, 4]
    assert journey.facts.failovers == 1


def test_a_token_that_overtook_the_first_one_waits_for_it():
    journey = journey_in(State.HANDOFF)
    assert commands_of(journey, JOINED, tokens("d", 1), tokens("d", 2)) == []
    [deliver] = commands_of(journey, tokens("p", 0))
    assert isinstance(deliver, ev.Deliver)
    assert [t.position for t in deliver.tokens] == [0, 1, 2]
    assert commands_of(journey, ev.WorkerLost("p")) == [], "its token is here and decode has the KV"


def test_a_first_token_that_never_comes_costs_the_attempt():
    journey = journey_in(State.HANDOFF)
    commands_of(journey, JOINED, tokens("d", 1))
    assert journey.wake_at == 4.0
    assert spell(commands_of(journey, ev.Tick(), now=4.0)) == "Cancel:d Cancel:p Place"
    assert len(journey.log) == 0


def test_losing_prefill_before_its_token_came_costs_the_attempt_even_when_decode_joined():
    journey = journey_in(State.HANDOFF)
    commands_of(journey, JOINED, tokens("d", 1))
    assert spell(commands_of(journey, ev.WorkerLost("p"))) == "Cancel:d Place"
    [reserve] = commands_of(journey, ev.Placed("q", "d"))
    assert isinstance(reserve, ev.SendReserve)
    assert reserve.item.position == 0, "what decode said without its predecessor was not delivered"


def test_a_gap_fails_the_attempt():
    journey = journey_in(State.DECODING)
    assert spell(commands_of(journey, tokens("d", 2))) == "Cancel:d Place"
    local = journey_in(State.LOCAL)
    assert spell(commands_of(local, tokens("d", 1))) == "Cancel:d Place"


def test_duplicates_are_dropped():
    journey = journey_in(State.DECODING)
    commands_of(journey, tokens("d", 1))
    assert commands_of(journey, tokens("d", 0, 1)) == []
    assert journey.log.ids == [100, 101]


def test_the_router_ends_what_the_worker_did_not():
    journey = journey_in(State.DECODING)
    assert spell(commands_of(journey, tokens("d", 1, 2, 3, 4, 5, 6, 7))) == "Deliver Cancel:d Finish"
    assert journey.log.finished is FinishReason.LENGTH


def test_refusals_wait_for_a_wake_and_do_not_count_as_failures():
    journey = new_journey()
    for attempt in range(1, 8):
        assert commands_of(journey, ev.Woken()) == [ev.Place(frozenset())]
        commands_of(journey, PAIR)
        assert commands_of(journey, ev.Reserved("d", attempt, False, "full")) == [ev.Place(frozenset({"d"}))]
        assert commands_of(journey, ev.NoPlace("full")) == []
        assert journey.wake_at == 10.0, "only the queue's own deadline"
    assert journey.facts.failovers == 0


def test_a_failure_keeps_away_from_the_worker_for_a_growing_while():
    journey = journey_in(State.LOCAL)
    assert commands_of(journey, ev.AttemptFailed("d", 1, *RETRY)) == [ev.Place(frozenset({"d"}))]
    commands_of(journey, ev.NoPlace("nobody"))
    first_wait = journey.wake_at - 2.0
    assert 0 < first_wait < 1
    assert commands_of(journey, ev.Woken()) == [ev.Place(frozenset({"d"}))], "a wake does not end the penalty"
    assert commands_of(journey, ev.Tick(), now=2.0 + first_wait) == [ev.Place(frozenset())]
    commands_of(journey, ev.Placed(None, "d"), ev.AttemptFailed("d", 2, *RETRY), now=3.0)
    assert journey.wake_at - 3.0 > first_wait


def test_too_many_failures_are_the_end():
    journey = new_journey()
    journey.handle(1.0, ev.Woken())
    for attempt in range(1, 3):
        commands_of(journey, ev.Placed(None, "d"), ev.AttemptFailed("d", attempt, *RETRY))
    commands_of(journey, ev.Placed(None, "d"))
    [finish] = commands_of(journey, ev.WorkerLost("d"))
    assert isinstance(finish, ev.Finish)
    assert isinstance(finish.error, UnavailableError)


def test_being_short_of_memory_is_not_a_failure():
    journey = new_journey()
    journey.handle(1.0, ev.Woken())
    for attempt in range(1, 9):
        failed = ev.AttemptFailed("d", attempt, OutOfBlocksError("full"), True)
        commands_of(journey, ev.Placed(None, "d"), failed)
        assert journey.state is State.QUEUED


def test_who_has_no_room_for_a_whole_request_is_asked_again_at_the_next_wake_and_not_by_the_clock():
    journey = journey_in(State.LOCAL)
    full = ev.AttemptFailed("d", 1, OverloadedError("one runs here already"), True)
    assert commands_of(journey, full) == [ev.Place(frozenset({"d"}))]
    commands_of(journey, ev.NoPlace("nobody"))
    assert journey.wake_at == 10.0, "the end of its time in the queue"
    assert commands_of(journey, ev.Woken()) == [ev.Place(frozenset())]
    assert spell(commands_of(journey, ev.Placed(None, "d"))) == "GenerateLocal:d", "those behind it wait until it is sure"
    assert spell(commands_of(journey, tokens("d", 0, attempt=2))) == "Accepted Deliver"
    assert spell(commands_of(journey, tokens("d", 1, attempt=2))) == "Deliver"
    assert journey.facts.failovers == 0


def test_after_a_failed_transfer_both_ends_are_avoided():
    journey = journey_in(State.HANDOFF)
    *_, place = commands_of(journey, ev.AttemptFailed("d", 1, TransferError("x"), True))
    assert place == ev.Place(frozenset({"p", "d"}))


def test_deadlines():
    waiting = new_journey()
    assert waiting.wake_at == 10.0
    waiting.handle(1.0, ev.NoPlace("full"))
    [finish] = waiting.handle(10.0, ev.Tick())
    assert isinstance(finish, ev.Finish)
    assert isinstance(finish.error, OverloadedError)
    assert "full" in finish.error.message

    alone = new_journey()
    alone.handle(1.0, ev.NoPlace("no decode worker is connected", busy=False))
    [finish] = alone.handle(10.0, ev.Tick())
    assert isinstance(finish, ev.Finish)
    assert isinstance(finish.error, UnavailableError)

    running = journey_in(State.DECODING)
    assert running.wake_at == 100.0
    *_, finish = running.handle(100.0, ev.Tick())
    assert isinstance(finish, ev.Finish)
    assert isinstance(finish.error, DeadlineExceededError)


def test_silence_is_a_failure_where_an_answer_is_due():
    reserving = journey_in(State.RESERVING)
    assert reserving.wake_at == 3.0
    assert spell(reserving.handle(3.0, ev.Tick())) == "Cancel:d Place"
    prefilling = journey_in(State.PREFILLING)
    assert prefilling.wake_at == 21.0
    commands = prefilling.handle(21.0, ev.Tick())
    assert spell(commands) == "Cancel:d Cancel:p Place"
    assert commands[-1] == ev.Place(frozenset({"p"}))


def test_claims_follow_the_work():
    journey = journey_in(State.RESERVING)
    assert journey.claim == Claim("p", 3, "d", 3)
    commands_of(journey, GRANTED, OPENED)
    assert journey.claim == Claim("p", 3, "d", 3)
    commands_of(journey, tokens("p", 0))
    assert journey.claim == Claim(None, 0, "d", 3), "the prompt is computed"
    commands_of(journey, ev.ClientCancelled())
    assert journey.claim == NO_CLAIM


def test_where_the_time_went():
    journey = new_journey()
    for now, event in (
        (0.25, ev.Woken()),
        (0.25, PAIR),
        (0.5, GRANTED),
        (0.6, OPENED),
        (1.5, tokens("p", 0)),
        (1.5, ev.PrefillDone("p", 1, AttemptTiming(queue_s=0.1, prefill_s=0.8), cached_tokens=2)),
        (1.75, ev.Joined("d", 1, AttemptTiming(handoff_wait_s=0.01, transfer_s=0.2, transfer_exposed_s=0.05))),
        (2.0, tokens("d", 1)),
        (2.5, tokens("d", 2, reason=FinishReason.STOP)),
    ):
        journey.handle(now, event)
    timing = journey.facts.timing(9.0)
    assert timing.queue_s == pytest.approx(0.6)
    assert (timing.prefill_s, timing.transfer_s, timing.transfer_exposed_s) == (0.8, 0.2, 0.05)
    assert (timing.handoff_wait_s, timing.first_decode_s) == (0.01, pytest.approx(0.44))
    assert (timing.ttft_s, timing.tpot_s, timing.total_s) == (1.5, 0.5, 2.5)
    assert journey.facts.cached_tokens == 2
