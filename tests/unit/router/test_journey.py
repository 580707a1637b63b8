"""Every state of a journey meets every event."""

from __future__ import annotations

import pytest
from journey_script import (
    DONE_PREFILL,
    GRANTED,
    JOINED,
    OPENED,
    PAIR,
    RETRY,
    ROAD,
    journey_in,
    spell,
    ticket,
    tokens,
)

from core.errors import (
    InvalidRequestError,
)
from core.request import AttemptTiming, FinishReason
from router import events as ev
from router.journey import State
from router.view import NO_CLAIM

EVENTS: dict[str, ev.Event] = {
    "woken": ev.Woken(),
    "placed": PAIR,
    "placed one": ev.Placed(None, "d"),
    "no place": ev.NoPlace("full"),
    "granted": GRANTED,
    "refused": ev.Reserved("d", 1, False, "full"),
    "opened": OPENED,
    "token from p": tokens("p", 0),
    "token from d": tokens("d", 0),
    "last from p": tokens("p", 0, reason=FinishReason.STOP),
    "last from d": tokens("d", 0, 1, reason=FinishReason.STOP),
    "given up by d": tokens("d", 0, reason=FinishReason.CANCELLED),
    "prefill done": DONE_PREFILL,
    "joined": JOINED,
    "p failed": ev.AttemptFailed("p", 1, *RETRY),
    "d failed": ev.AttemptFailed("d", 1, *RETRY),
    "p failed for good": ev.AttemptFailed("p", 1, InvalidRequestError("x"), False),
    "d failed for good": ev.AttemptFailed("d", 1, InvalidRequestError("x"), False),
    "p lost": ev.WorkerLost("p"),
    "d lost": ev.WorkerLost("d"),
    "other lost": ev.WorkerLost("z"),
    "stop": ev.StopMatched(),
    "cancel": ev.ClientCancelled(),
    "early tick": ev.Tick(),
}
STATES = (State.QUEUED, State.RESERVING, State.PREFILLING, State.HANDOFF, State.DECODING, State.LOCAL)
SAME = ""  # nothing happens
# What each state does with each event: "NEXT: commands", empty when the event changes nothing.
TABLE = {
    # QUEUED, RESERVING, PREFILLING, HANDOFF, DECODING, LOCAL
    "woken": ("QUEUED: Place", SAME, SAME, SAME, SAME, SAME),
    "placed": ("RESERVING: Reserve:d", SAME, SAME, SAME, SAME, SAME),
    "placed one": ("LOCAL: GenerateLocal:d Accepted", SAME, SAME, SAME, SAME, SAME),
    "no place": (SAME, SAME, SAME, SAME, SAME, SAME),
    "granted": (SAME, "PREFILLING: StartPrefill:p Accepted", SAME, SAME, SAME, SAME),
    "refused": (SAME, "QUEUED: Place", SAME, SAME, SAME, SAME),
    "opened": (SAME, SAME, "HANDOFF: OpenHandoff:d", SAME, SAME, SAME),
    "token from p": (SAME, SAME, "PREFILLING: Deliver", "HANDOFF: Deliver", SAME, SAME),
    "token from d": (SAME, "RESERVING: Deliver", "PREFILLING: Deliver", "HANDOFF: Deliver", SAME, "LOCAL: Deliver"),
    "last from p": (
        SAME,
        SAME,
        "DONE: Deliver Cancel:d Cancel:p Finish",
        "DONE: Deliver Cancel:d Cancel:p Finish",
        SAME,
        SAME,
    ),
    "last from d": (
        SAME,
        "DONE: Deliver Finish",
        "DONE: Deliver Cancel:p Finish",
        "DONE: Deliver Cancel:p Finish",
        "DONE: Deliver Finish",
        "DONE: Deliver Finish",
    ),
    "given up by d": (
        SAME,
        "QUEUED: Place",
        "QUEUED: Cancel:p Place",
        "QUEUED: Cancel:p Place",
        "QUEUED: Place",
        "QUEUED: Place",
    ),
    "prefill done": (SAME, SAME, SAME, SAME, SAME, SAME),
    "joined": (SAME, SAME, SAME, "DECODING:", SAME, SAME),
    "p failed": (SAME, SAME, "QUEUED: Cancel:d Place", "QUEUED: Cancel:d Place", SAME, SAME),
    "d failed": (SAME, "QUEUED: Place", "QUEUED: Cancel:p Place", "QUEUED: Cancel:p Place", "QUEUED: Place", "QUEUED: Place"),
    "p failed for good": (SAME, SAME, "DONE: Cancel:d Finish", "DONE: Cancel:d Finish", SAME, SAME),
    "d failed for good": (
        SAME,
        "DONE: Finish",
        "DONE: Cancel:p Finish",
        "DONE: Cancel:p Finish",
        "DONE: Finish",
        "DONE: Finish",
    ),
    "p lost": (SAME, "QUEUED: Cancel:d Place", "QUEUED: Cancel:d Place", "QUEUED: Cancel:d Place", SAME, SAME),
    "d lost": (SAME, "QUEUED: Place", "QUEUED: Cancel:p Place", "QUEUED: Cancel:p Place", "QUEUED: Place", "QUEUED: Place"),
    "other lost": (SAME, SAME, SAME, SAME, SAME, SAME),
    "stop": (
        "DONE: Finish",
        "DONE: Cancel:d Finish",
        "DONE: Cancel:d Cancel:p Finish",
        "DONE: Cancel:d Cancel:p Finish",
        "DONE: Cancel:d Finish",
        "DONE: Cancel:d Finish",
    ),
    "early tick": (SAME, SAME, SAME, SAME, SAME, SAME),
}
TABLE["cancel"] = TABLE["stop"]


@pytest.mark.parametrize("name", EVENTS)
@pytest.mark.parametrize("state", STATES)
def test_every_state_meets_every_event(state: State, name: str):
    journey = journey_in(state)
    expected = TABLE[name][STATES.index(state)] or f"{state.name}:"
    commands = journey.handle(1.5, EVENTS[name])
    assert f"{journey.state.name}: {spell(commands)}".strip() == expected.strip()
    assert (journey.claim == NO_CLAIM) == (journey.state in (State.QUEUED, State.DONE))


@pytest.mark.parametrize("name", EVENTS)
def test_what_is_over_stays_over(name: str):
    journey = journey_in(State.DONE)
    assert journey.handle(1.5, EVENTS[name]) == []
    assert journey.state is State.DONE


WORKER_EVENTS = [
    ev.Reserved("d", 1, True),
    ev.Opened("p", 1, ticket()),
    tokens("d", 0),
    ev.PrefillDone("p", 1, AttemptTiming()),
    ev.Joined("d", 1, AttemptTiming()),
    ev.AttemptFailed("d", 1, *RETRY),
]


@pytest.mark.parametrize("event", WORKER_EVENTS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("state", STATES[1:])
def test_an_older_attempt_is_not_heard(state: State, event: ev.WorkerEvent):
    """Attempt 1 was lost, attempt 2 has reached `state` on the same workers: nothing attempt 1 says may count."""
    journey = journey_in(State.RESERVING)
    journey.handle(1.0, ev.WorkerLost("d"))
    for step in ROAD[state][1:]:
        if isinstance(step, ev.Tokens):
            step = tokens(step.worker, 0, attempt=2)
        elif not isinstance(step, ev.Placed):
            fields = {name: getattr(step, name) for name in step.__dataclass_fields__}
            step = type(step)(**{**fields, "attempt": 2})
        journey.handle(1.0, step)
    assert journey.state is state
    assert journey.handle(1.1, event) == []
    assert journey.state is state


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("worker", ["p", "d", "x"])
@pytest.mark.parametrize("attempt", [1, 2])
@pytest.mark.parametrize("positions", [(0,), (1,), (1, 2), (2,), (7,)])
def test_running_on_is_what_handling_would_do_or_nothing(state: State, worker: str, attempt: int, positions: tuple[int, ...]):
    quick, twin = journey_in(state), journey_in(state)
    event = tokens(worker, *positions, attempt=attempt)
    took = quick.run_on(2.0, event)
    assert took == (state is State.DECODING and worker == "d" and attempt == 1 and positions in ((1,), (1, 2)))
    if took:
        assert twin.handle(2.0, event) == [ev.Deliver(event.tokens)]
    assert (quick.log.ids, quick.facts, quick.claim, quick.wake_at) == (twin.log.ids, twin.facts, twin.claim, twin.wake_at)
