"""Drives journeys: carries their commands out, feeds back what happens, keeps the time.

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
from router.journey import Journey, State
from router.live import Live, Sessions, Sink
from router.placing import Placer
from router.policy import Pair
from router.pump import Pump
from router.situation import Situation
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
        timers = LoopTimers() if timers is None else timers
        self._alarms = Alarms(clock, timers, self._ring)
        self._pump = Pump(placer, room, clock, timers, self._wake)

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
        self._pump.soon()

    def link_up(self, worker: str) -> None:
        assert self.links is not None
        for cancel in self._orphans.pop(worker, ()):  # what was placed again elsewhere may still be computed here
            self.links.send(cancel)
        self._pump.soon()
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
            self._pump.soon()
        live.accepted = live.accepted and live.claim is not NO_CLAIM

    def _carry_out(self, live: Live, command: ev.Command) -> None:
        match command:
            case ev.Deliver(tokens):
                self.room.generated(live.journey.spec.tenant, len(tokens), self._clock.now())
                live.sink.deliver(tokens)
            case ev.Place(avoid):
                live.inbox.append(self._pump.ask(live, self.situation(), avoid))
            case ev.Accepted():
                live.accepted = True
                live.asked_at = None
                self.placer.accepted(live.journey.claim, live.keys or (), self._clock.now())
                self.room.taken(live.journey.spec, self._clock.now(), again=live.taken)
                live.taken = True
                self._pump.leave(live.journey.spec.request_id)
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

    def _line_up(self, live: Live) -> None:
        """Behind others. Raises SloUnattainableError when its turn would come too late."""
        refusal = self._pump.line_up(live, self.situation())
        if refusal is not None:
            raise refusal.error()
        self._drive(live, ev.NoPlace("others wait before it"))

    def _wake(self, request_id: str) -> None:
        self._drive(self._live[request_id], ev.Woken())

    def _forget(self, live: Live) -> None:
        spec = live.journey.spec
        del self._live[spec.request_id]
        self._alarms.forget(spec.request_id)
        self.room.left(spec)
        self._pump.leave(spec.request_id)

    # ---- time ------------------------------------------------------------------------------------------------------

    def _set_alarm(self, live: Live) -> None:
        """An alarm that turns out early is set again when it rings: most deadlines only move away."""
        request_id, wake_at = live.journey.spec.request_id, live.wake_at
        if wake_at < self._alarms.due(request_id) and live.journey.state is not State.DONE:
            self._alarms.set(request_id, min(wake_at, self._clock.now() + ALARM_MAX_S))

    def _ring(self, request_id: str, now: float) -> None:
        live = self._live.get(request_id)
        if live is None:
            return
        refusal = self._pump.look_again(live, now) if live.look_at <= now else None
        if refusal is not None:
            self._drive(live, ev.Refused(refusal.error()))
        elif live.journey.wake_at <= now:
            self._drive(live, ev.Tick())
        else:
            self._set_alarm(live)
