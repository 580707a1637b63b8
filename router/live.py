"""A journey that is under way, as its dispatcher keeps it."""

from __future__ import annotations

from collections import deque
from typing import Protocol

from core.blocks import BlockKey
from core.errors import TandemError
from core.request import FinishReason, TokenEvent
from router import events as ev
from router.journey import Journey
from router.policy import Pair
from router.view import ClusterView

NEVER = float("inf")


class Sink(Protocol):
    """Where a journey's outcome goes. Called on the asyncio thread, never waits; may call back into the dispatcher."""

    def accepted(self) -> None:
        """A worker took an attempt; called once per attempt."""
        ...

    def deliver(self, tokens: tuple[TokenEvent, ...]) -> None: ...

    def finish(self, reason: FinishReason | None, error: TandemError | None) -> None:
        """The last call (or, after a finish that raised, once more with an error). Exactly one of the two is set."""
        ...


class Sessions(Protocol):
    """The sessions with workers (`router.links.Links`)."""

    def connected(self) -> frozenset[str]: ...

    def send(self, command: ev.Send) -> None:
        """To a connected worker; lost with its session."""
        ...

    def follow(self, view: ClusterView) -> None:
        """Opens and ends sessions, so that there is one with every worker that serves."""
        ...


class Live:
    __slots__ = (
        "accepted", "asked_at", "claim", "driving", "failovers", "inbox", "journey", "keys", "look_at", "prefer",
        "sink", "taken",
    )  # fmt: skip

    def __init__(self, journey: Journey, sink: Sink, prefer: Pair | None) -> None:
        self.journey = journey
        self.sink = sink
        self.prefer = prefer
        self.keys: tuple[BlockKey, ...] | None = None  # made when it is first placed
        self.claim = journey.claim
        self.accepted = False  # a worker took the attempt that holds the claim
        self.taken = False  # ... or an earlier one
        self.asked_at: int | None = None  # the dispatcher's count of changes when this round of asking began
        self.look_at = NEVER  # while it waits: when to look whether that is of any use
        self.failovers = 0
        self.driving = False
        self.inbox: deque[ev.Event] = deque()  # events that came while it was being driven

    @property
    def wake_at(self) -> float:
        return min(self.journey.wake_at, self.look_at)
