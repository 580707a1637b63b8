"""Brings those who ask to a place, keeps in the queue who finds none, and wakes those who wait there: one at a time."""

from __future__ import annotations

from collections.abc import Callable

from core.clock import Clock
from router import events as ev
from router.early_rejection import Hold, Refusal
from router.live import NEVER, Live
from router.placing import Placer
from router.policy import Need, Nobody
from router.situation import NOBODY, Situation
from router.timers import Timers
from router.waiting_room import WaitingRoom


class Pump:
    """Of one dispatcher. `wake` has the request of that name ask for a place again.

    The head of the queue probes: it asks, and its successor is woken when it has its place. Nobody is overtaken, and a cluster
    without room is asked once per change, not once per request.
    """

    def __init__(self, placer: Placer, room: WaitingRoom, clock: Clock, timers: Timers, wake: Callable[[str], None]) -> None:
        self._placer = placer
        self._room = room
        self._queue = room.queue
        self._clock = clock
        self._timers = timers
        self._wake = wake
        self._probing: str | None = None
        self._due = False
        self._changes = 0  # times that capacity may have come free

    # ---- waking ----------------------------------------------------------------------------------------------------

    def soon(self) -> None:
        """Capacity may have come free. Once per turn of the loop, however many causes."""
        self._changes += 1
        if len(self._queue) and not self._due:
            self._due = True
            self._timers.soon(self._wake_head)

    def _wake_head(self) -> None:
        self._due = False
        head = self._queue.head(self._clock.now())
        if head is not None and self._probing is None:
            self._probing = head
            self._wake(head)

    # ---- asking ----------------------------------------------------------------------------------------------------

    def ask(self, live: Live, situation: Situation, avoid: frozenset[str]) -> ev.Placed | ev.NoPlace | ev.Refused:
        """A place, elsewhere than at `avoid`; without one it waits in the queue, unless that would be of no use."""
        journey = live.journey
        need = self._need(live, situation, avoid)
        decision = self._placer.decide(situation, need, journey)
        choice, verdict = decision.place, None
        if not live.taken:
            verdict = self._room.judge(journey.spec, journey.facts.arrived_at, decision, situation, need.now)
        if isinstance(verdict, Refusal):
            return ev.Refused(verdict.error())
        if isinstance(verdict, Hold):
            choice = Nobody(verdict.reason, busy=True, again_s=verdict.look_at - need.now)
        if isinstance(choice, Nobody):
            live.look_at = need.now + choice.again_s
            refusal = self._wait(live, situation, need)
            return ev.NoPlace(choice.reason, choice.busy) if refusal is None else ev.Refused(refusal.error())
        if live.asked_at is None:
            live.asked_at = self._changes
        self._room.expect(journey.spec, decision, need)
        return ev.Placed(choice.prefill, choice.decode, decision.hold_until)

    def line_up(self, live: Live, situation: Situation) -> Refusal | None:
        """Puts it behind others, without asking for a place; or refuses it, because its turn would come too late."""
        refusal = self._wait(live, situation, self._need(live, situation, NOBODY))
        if refusal is None and self._queue.head(self._clock.now()) == live.journey.spec.request_id:
            self.soon()  # it goes before those who were found no place
        return refusal

    def look_again(self, live: Live, now: float) -> Refusal | None:
        """It waits: is that still of use? If so, it asks again when its turn comes."""
        request_id = live.journey.spec.request_id
        live.look_at = NEVER
        if request_id not in self._queue:
            return None
        give_up_at = self._room.give_up_at(request_id)
        if now >= give_up_at:
            return Refusal("its limits cannot be kept any more: no place came free in time", self._room.retry_s())
        live.look_at = give_up_at
        self.soon()
        return None

    def leave(self, request_id: str) -> None:
        """It has its place, or wants none any more."""
        if request_id in self._queue:
            self._queue.remove(request_id)
            self.soon()
        if self._probing == request_id:
            self._probing = None

    def _wait(self, live: Live, situation: Situation, need: Need) -> Refusal | None:
        spec, facts = live.journey.spec, live.journey.facts
        refusal = self._room.wait(spec, facts.arrived_at, situation, need, urgent=facts.failovers > 0)
        if self._probing == spec.request_id:
            self._probing = None  # nobody has room: the next change of the cluster wakes the head again
            if self._queue.head(need.now) != spec.request_id:  # ... but it lets others go first
                self.soon()
        if live.asked_at not in (None, self._changes):
            self.soon()  # ... and one came while the refusal was on its way
        live.asked_at = None
        live.look_at = min(live.look_at, self._room.give_up_at(spec.request_id))
        return refusal

    def _need(self, live: Live, situation: Situation, avoid: frozenset[str]) -> Need:
        journey, now = live.journey, self._clock.now()
        if live.keys is None:
            live.keys = self._placer.keys(situation, journey.spec)
        its_turn = self._queue.turn_of_overdue(now) == journey.spec.request_id
        return self._placer.need(journey, avoid, live.prefer, live.keys, now, its_turn)
