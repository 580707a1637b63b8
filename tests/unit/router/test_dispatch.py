"""Driving journeys on virtual time: what a dispatcher does when nobody answers."""

from __future__ import annotations

import random

from test_placing import view, worker

from core.config import RouterConfig
from core.errors import TandemError, UnavailableError
from core.request import FinishReason, TokenEvent, WorkerRole
from router import events as ev
from router.attempt import JourneySpec, Limits
from router.dispatch import Dispatcher
from router.live import Sink
from router.placing import Placer
from router.policy import Decision, LeastLoad, Need, Nobody
from router.situation import Situation
from router.view import ClusterView
from router.waiting_room import WaitingRoom
from sim.events import Events
from tandem.sampling import SamplingParams


class NotYet(LeastLoad):
    """Has every request wait once, although there is room."""

    def __init__(self, again_s: float) -> None:
        self.asked = 0
        self._again_s = again_s

    def decide(self, situation: Situation, need: Need) -> Decision:
        self.asked += 1
        if self.asked == 1:
            return Decision(Nobody("not yet", busy=True, again_s=self._again_s))
        return super().decide(situation, need)


class Silent:
    """Sessions with workers that say nothing by themselves."""

    def __init__(self, *workers: str) -> None:
        self.sent: list[ev.Send] = []
        self._connected = frozenset(workers)

    def connected(self) -> frozenset[str]:
        return self._connected

    def send(self, command: ev.Send) -> None:
        self.sent.append(command)

    def follow(self, view: ClusterView) -> None: ...


class Ending(Sink):
    def __init__(self) -> None:
        self.error: TandemError | None = None

    def accepted(self) -> None: ...

    def deliver(self, tokens: tuple[TokenEvent, ...]) -> None: ...

    def finish(self, reason: FinishReason | None, error: TandemError | None) -> None:
        self.error = error


def test_who_was_placed_before_it_was_to_look_again_still_has_its_deadlines() -> None:
    events, links, policy, ending = Events(), Silent("p0", "d0"), NotYet(again_s=3.0), Ending()
    limits = Limits(opened_timeout_s=5.0, max_attempts=1)
    room = WaitingRoom(RouterConfig())
    dispatcher = Dispatcher(Placer(policy, 10.0, random.Random(0)), limits, room, events, events)
    dispatcher.links = links
    cluster = view(worker("p0", WorkerRole.PREFILL), worker("d0", WorkerRole.DECODE))
    dispatcher.follow(cluster)
    dispatcher.start(JourneySpec("r", (1, 2, 3), SamplingParams(max_tokens=4, seed=1)), ending, events.now())
    assert not links.sent
    events.at(1.0, dispatcher.follow, cluster)  # something changed: it is asked for
    events.run(until=2.0)
    assert [type(command) for command in links.sent] == [ev.SendReserve]
    dispatcher.heard("d0", [("r", ev.Reserved("d0", 1, True))])
    assert type(links.sent[-1]) is ev.SendStartPrefill
    events.run(until=8.0)
    assert isinstance(ending.error, UnavailableError), "p0 did not answer"
    assert policy.asked == 2
    assert not len(dispatcher)
