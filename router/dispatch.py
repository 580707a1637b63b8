"""Drives journeys: carries their commands out, feeds back what happens, keeps the time and the queue.

Everything runs on one thread, that of its timers; nothing here waits. A message of a worker reaches its journeys, and
through them the readers' outboxes, in one go: no task per request, none per token.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable

from core.clock import Clock
from core.errors import InternalError, OverloadedError
from router import events as ev
from router.alarms import Alarms
from router.attempt import JourneySpec, Limits
from router.codec import Addressed
from router.early_rejection import Hold, Refusal
from router.journey import Journey, State
from router.live import NEVER, Live, Sessions, Sink
from router.placing import Placer
from router.policy import Need, Nobody, Pair
from router.situation import NOBODY, Situation
from router.slo import Terms
from router.timers import LoopTimers, Timers
from router.view import NO_CLAIM, ClusterView
from router.waiting_room import WaitingRoom

log = logging.getLogger(__name__)

ORPHANS_MAX = 4096
ALARM_MAX_S = 10.0
"""An alarm outlives its journey by at most this long, so the heap stays small."""


class Dispatcher:
    """Owns the live journeys. `links` is attached after construction, because sessions report to the dispatcher."""

    def __init__(self, placer: Placer, limits: Limits, room: WaitingRoom, clock: Clock, timers: Timers | None = None) -> None:
        self.links: Sessions | None = None
        self.view = ClusterView()
        self.placer = placer
        self.room = room
        self.queue = room.queue
        self.queue.begins_s = lambda now: placer.begins_s(self.situation(), now)
        self.attempts: Counter[str] = Counter()  # by outcome: refused, failed, lost, or how their journey ended
        self.failovers = 0
        self.on_change: Callable[[], None] = lambda: None  # sessions or the view changed
        self._limits = limits
        self._clock = clock
        self._live: dict[str, Live] = {}
        self._orphans: dict[str, list[ev.SendCancel]] = {}
        self._timers = LoopTimers() if timers is None else timers
        self._alarms = Alarms(clock, self._timers, self._ring)
        self._probing: str | None = None
        self._pump_due = False
        self._changes = 0  # times that capacity may have come free

    # ---- what the front asks ---------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._live)

    def check_room(self, terms: Terms) -> None:
        """Raises OverloadedError when a new request could not even wait, or its tenant has used up its quota."""
        self.room.check(terms.tenant, terms.slo_class, self._clock.now())

    def start(
        self, spec: JourneySpec, sink: Sink, arrived_at: float, *, prefer: Pair | None = None, admitted: bool = False
    ) -> Journey:
        """Begins a journey, whose deadlines count from `arrived_at`; its outcome reaches `sink`, possibly before this returns.

        `admitted`: it belongs to a request that runs already, so the queue's bound does not apply.
        Raises OverloadedError, and nothing remains, when it would have to wait and the queue is full or its turn too late.
        """
        assert spec.request_id not in self._live, "the front keeps request ids unique"
        live = Live(Journey(spec, self._limits, arrived_at), sink, prefer)
        self._live[spec.request_id] = live
        self.room.entered(spec)
        try:
            if len(self.queue):
                self._line_up(live)
            else:
                self._drive(live, ev.Woken())
            if spec.request_id in self.queue and not admitted:
                self.room.check_room(spec.tenant, spec.slo_class, more=0)
        except OverloadedError:
            self._forget(live)
            raise
        return live.journey

    def signal(self, request_id: str, event: ev.StopMatched | ev.ClientCancelled) -> bool:
        """Ends a journey from outside; False when it is not live (any more)."""
        live = self._live.get(request_id)
        if live is not None:
            self._drive(live, event)
        return live is not None

    def situation(self) -> Situation:
        connected = self.links.connected() if self.links is not None else frozenset()
        return self.placer.situation(self.view, connected, self._clock.now())

    def states(self) -> Counter[State]:
        return Counter(live.journey.state for live in self._live.values())

    # ---- what workers and the controller say -----------------------------------------------------------------------

    def follow(self, view: ClusterView) -> None:
        """A new snapshot: sessions follow it, and those who wait may have a place now."""
        assert self.links is not None
        self.view = view.keeping(self.view, self.links.connected(), self._clock.now())
        self.links.follow(self.view)
        self._orphans = {name: cancels for name, cancels in self._orphans.items() if name in self.view.workers}
        self.situation()  # what is claimed now is in these reports, what will be is not
        self.on_change()
        self._pump_soon()

    def link_up(self, worker: str) -> None:
        assert self.links is not None
        for cancel in self._orphans.pop(worker, ()):  # what was placed again elsewhere may still be computed here
            self.links.send(cancel)
        self._pump_soon()
        self.on_change()

    def link_down(self, worker: str, reason: str) -> None:
        self.placer.lost(worker)
        affected = list(self._live.values())
        keys = [key for live in affected if (key := live.journey.held_on(worker)) is not None]
        self._orphans[worker] = [ev.SendCancel(worker, key) for key in keys[:ORPHANS_MAX]]
        for live in affected:
            self._drive(live, ev.WorkerLost(worker, f"{worker}: {reason}"))
        self.on_change()

    def heard(self, worker: str, events: Iterable[Addressed]) -> None:
        now, lives = self._clock.now(), self._live
        served: dict[str, int] = {}  # by tenant: charged once for a step's tokens, not for each
        for request_id, event in events:
            live = lives.get(request_id)
            if live is None:
                continue
            if type(event) is ev.Tokens and not live.driving and live.journey.run_on(now, event):
                tenant = live.journey.spec.tenant
                served[tenant] = served.get(tenant, 0) + len(event.tokens)
                try:
                    live.sink.deliver(event.tokens)
                except Exception:
                    log.exception("request %s: a mistake of ours on its tokens", request_id)
                    self._abandon(live, now)
                    self._move_claim(live, event)
            else:
                self._drive(live, event, now)
        for tenant, tokens in served.items():
            self.room.generated(tenant, tokens, now)

    def close(self) -> None:
        """Ends every journey; their workers are told."""
        for live in list(self._live.values()):
            self._drive(live, ev.ClientCancelled())
        self._alarms.close()

    # ---- the drive -------------------------------------------------------------------------------------------------

    def _drive(self, live: Live, event: ev.Event, now: float | None = None) -> None:
        """Feeds one event and everything that follows from it. What sinks and places cause meanwhile waits its turn."""
        if live.driving:
            live.inbox.append(event)
            return
        now = self._clock.now() if now is None else now
        live.driving = True
        journey, inbox = live.journey, live.inbox
        try:
            for command in journey.handle(now, event):
                self._carry_out(live, command)
            while inbox:
                for command in journey.handle(now, inbox.popleft()):
                    self._carry_out(live, command)
        except Exception:
            log.exception("request %s: a mistake of ours on %s", journey.spec.request_id, type(event).__name__)
            self._abandon(live, now)
        finally:
            live.driving = False
        if journey.claim is not live.claim:
            self._move_claim(live, event)
        self._set_alarm(live)

    def _abandon(self, live: Live, now: float) -> None:
        """Ends one journey after a mistake, so that it harms no other: its workers are told, its user gets an error."""
        live.inbox.clear()
        for command in live.journey.handle(now, ev.ClientCancelled()):
            if isinstance(command, ev.SendCancel) and self.links is not None and command.worker in self.links.connected():
                self.links.send(command)
        if live.journey.spec.request_id in self._live:
            self._forget(live)
        live.sink.finish(None, InternalError("the router made a mistake on this request; its log says which"))

    def _move_claim(self, live: Live, event: ev.Event) -> None:
        """What an accepted attempt gives back is room for those who wait; what was refused never was."""
        self.placer.moved(live.claim, live.journey.claim, self._clock.now(), live.journey.facts)
        live.claim = live.journey.claim
        lost = live.journey.facts.failovers - live.failovers
        if lost:
            self.failovers += lost
            self.attempts["lost" if isinstance(event, ev.WorkerLost) else "failed"] += lost
            live.failovers += lost
        elif isinstance(event, ev.AttemptFailed) or (isinstance(event, ev.Reserved) and not event.granted):
            self.attempts["refused"] += 1
        if live.accepted:
            self._pump_soon()
        live.accepted = live.accepted and live.claim is not NO_CLAIM

    def _carry_out(self, live: Live, command: ev.Command) -> None:
        match command:
            case ev.Deliver(tokens):
                self.room.generated(live.journey.spec.tenant, len(tokens), self._clock.now())
                live.sink.deliver(tokens)
            case ev.Place(avoid):
                self._place(live, avoid)
            case ev.Accepted():
                live.accepted = True
                live.asked_at = None
                self.placer.accepted(live.journey.claim, live.keys or (), self._clock.now())
                self.room.taken(live.journey.spec, self._clock.now(), again=live.taken)
                live.taken = True
                self._leave_queue(live)
                live.sink.accepted()
            case ev.Finish(reason, error):
                self.placer.ended(live.journey, reason, error)
                if live.accepted:
                    self.attempts[reason.value if reason is not None else "failed"] += 1
                self._forget(live)
                live.sink.finish(reason, error)
            case _:
                assert self.links is not None
                self.links.send(command)

    def _place(self, live: Live, avoid: frozenset[str]) -> None:
        journey, situation = live.journey, self.situation()
        need = self._need(live, situation, avoid)
        decision = self.placer.decide(situation, need, journey)
        choice, verdict = decision.place, None
        if not live.taken:
            verdict = self.room.judge(journey.spec, journey.facts.arrived_at, decision, situation, need.now)
        if isinstance(verdict, Hold):
            choice = Nobody(verdict.reason, busy=True, again_s=verdict.look_at - need.now)
        if isinstance(choice, Nobody) and not isinstance(verdict, Refusal):
            live.look_at = need.now + choice.again_s
            verdict = self._wait(live, situation, need)
            live.inbox.append(ev.NoPlace(choice.reason, choice.busy))
        if isinstance(verdict, Refusal):
            live.inbox.append(ev.Refused(verdict.error()))
        elif isinstance(choice, Pair):
            live.asked_at = self._changes if live.asked_at is None else live.asked_at
            self.room.expect(journey.spec, decision, need)
            live.inbox.append(ev.Placed(choice.prefill, choice.decode))

    def _need(self, live: Live, situation: Situation, avoid: frozenset[str] = NOBODY) -> Need:
        if live.keys is None:
            live.keys = self.placer.keys(situation, live.journey.spec)
        its_turn = self.queue.turn_of_overdue(now := self._clock.now()) == live.journey.spec.request_id
        return self.placer.need(live.journey, avoid, live.prefer, live.keys, now, its_turn)

    def _forget(self, live: Live) -> None:
        spec = live.journey.spec
        del self._live[spec.request_id]
        self._alarms.forget(spec.request_id)
        self.room.left(spec)
        self._leave_queue(live)

    # ---- the queue -------------------------------------------------------------------------------------------------

    def _line_up(self, live: Live) -> None:
        """Behind others, without asking for a place. Raises SloUnattainableError when its turn would come too late."""
        situation = self.situation()
        refusal = self._wait(live, situation, self._need(live, situation))
        if refusal is not None:
            raise refusal.error()
        self._drive(live, ev.NoPlace("others wait before it"))
        if self.queue.head(self._clock.now()) == live.journey.spec.request_id:
            self._pump_soon()  # it goes before those who were found no place

    def _wait(self, live: Live, situation: Situation, need: Need) -> Refusal | None:
        spec, facts = live.journey.spec, live.journey.facts
        refusal = self.room.wait(spec, facts.arrived_at, situation, need, urgent=facts.failovers > 0)
        if self._probing == spec.request_id:
            self._probing = None  # nobody has room: the next change of the cluster wakes the head again
            if self.queue.head(need.now) != spec.request_id:  # ... but it lets others go first
                self._pump_soon()
        if live.asked_at not in (None, self._changes):
            self._pump_soon()  # ... and one came while the refusal was on its way
        live.asked_at = None
        live.look_at = min(live.look_at, self.room.give_up_at(spec.request_id))
        self._set_alarm(live)
        return refusal

    def _look_again(self, live: Live, now: float) -> None:
        """It waits: is that still of use? If so, it asks again when its turn comes."""
        request_id = live.journey.spec.request_id
        live.look_at = NEVER
        if request_id not in self.queue:
            return
        give_up_at = self.room.give_up_at(request_id)
        if now >= give_up_at:
            refusal = Refusal("its limits cannot be kept any more: no place came free in time", self.room.retry_s())
            self._drive(live, ev.Refused(refusal.error()))
        else:
            live.look_at = give_up_at
            self._pump_soon()
            self._set_alarm(live)

    def _leave_queue(self, live: Live) -> None:
        request_id = live.journey.spec.request_id
        if request_id in self.queue:
            self.queue.remove(request_id)
            self._pump_soon()
        if self._probing == request_id:
            self._probing = None

    def _pump_soon(self) -> None:
        """Capacity may have come free. Once per turn of the loop, however many causes."""
        self._changes += 1
        if len(self.queue) and not self._pump_due:
            self._pump_due = True
            self._timers.soon(self._pump)

    def _pump(self) -> None:
        """Lets the head ask for a place; its successor follows when it has one. One at a time: nobody is overtaken."""
        self._pump_due = False
        head = self.queue.head(self._clock.now())
        if head is not None and self._probing is None:
            self._probing = head
            self._drive(self._live[head], ev.Woken())

    # ---- time ------------------------------------------------------------------------------------------------------

    def _set_alarm(self, live: Live) -> None:
        """An alarm that turns out early is set again when it rings: most deadlines only move away."""
        request_id, wake_at = live.journey.spec.request_id, live.wake_at
        if wake_at < self._alarms.due(request_id) and live.journey.state is not State.DONE:
            self._alarms.set(request_id, min(wake_at, self._clock.now() + ALARM_MAX_S))

    def _ring(self, request_id: str, now: float) -> None:
        if (live := self._live.get(request_id)) is None:
            return
        if live.look_at <= now:
            self._look_again(live, now)
        elif live.journey.wake_at <= now:
            self._drive(live, ev.Tick())
        else:
            self._set_alarm(live)
