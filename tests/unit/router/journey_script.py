"""A journey brought to any of its states, and its commands spelled in words."""

from __future__ import annotations

from core.blocks import KvLayout, KvSource, KvTicket
from core.errors import (
    InvalidRequestError,
)
from core.request import AttemptKey, AttemptTiming, FinishReason, TokenEvent
from router import events as ev
from router.attempt import JourneySpec, Limits
from router.journey import Journey, State
from tandem.sampling import SamplingParams

PROMPT = (11, 12, 13)
LIMITS = Limits(queue_timeout_s=10, request_timeout_s=100, max_attempts=3, answer_timeout_s=2, opened_timeout_s=20)
LAYOUT = KvLayout(b"f" * 16, "float32", 1, 1, 8, 16)


def ticket(attempt: int = 1) -> KvTicket:
    return KvTicket(AttemptKey("r", attempt), LAYOUT, KvSource("p", 1, "127.0.0.1:1"), 10.0)


def token(position: int, attempt: int = 1, reason: FinishReason | None = None) -> TokenEvent:
    return TokenEvent(AttemptKey("r", attempt), position, 100 + position, finish_reason=reason)


def tokens(worker: str, *positions: int, attempt: int = 1, reason: FinishReason | None = None) -> ev.Tokens:
    made = [token(p, attempt) for p in positions[:-1]] + [token(positions[-1], attempt, reason)]
    return ev.Tokens(worker, attempt, tuple(made))


def new_journey(max_tokens: int = 8) -> Journey:
    sampling = SamplingParams(max_tokens=max_tokens, seed=1, stop=("x",), n=2)
    return Journey(JourneySpec("r", PROMPT, sampling, eos_token_ids=(2,)), LIMITS, now=0.0)


PAIR = ev.Placed("p", "d")
GRANTED = ev.Reserved("d", 1, True)
OPENED = ev.Opened("p", 1, ticket())
DONE_PREFILL = ev.PrefillDone("p", 1, AttemptTiming())
JOINED = ev.Joined("d", 1, AttemptTiming())
ROAD = {
    State.QUEUED: [ev.Woken()],
    State.RESERVING: [ev.Woken(), PAIR],
    State.PREFILLING: [ev.Woken(), PAIR, GRANTED],
    State.HANDOFF: [ev.Woken(), PAIR, GRANTED, OPENED],
    State.DECODING: [ev.Woken(), PAIR, GRANTED, OPENED, tokens("p", 0), DONE_PREFILL, JOINED],
    State.LOCAL: [ev.Woken(), ev.Placed(None, "d")],
    State.DONE: [ev.Woken(), PAIR, ev.ClientCancelled()],
}


def journey_in(state: State) -> Journey:
    journey = new_journey()
    for event in ROAD[state]:
        journey.handle(1.0, event)
    assert journey.state is state
    return journey


def spell(commands: list[ev.Command]) -> str:
    """`Cancel:d Place` …: what the table is written in."""
    words = []
    for command in commands:
        name = type(command).__name__.removeprefix("Send")
        worker = getattr(command, "worker", None)
        words.append(f"{name}:{worker}" if worker else name)
    return " ".join(words)


def commands_of(journey: Journey, *events: ev.Event, now: float = 2.0) -> list[ev.Command]:
    return [command for event in events for command in journey.handle(now, event)]


RETRY = InvalidRequestError("x"), True
