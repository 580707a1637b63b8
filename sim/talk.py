"""What a worker says to its routers: each message takes the link's latency, all tokens of a step go in one."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING

from core.errors import DeadlineExceededError, InternalError, OutOfBlocksError, TandemError, UnavailableError
from core.request import AttemptKey, TokenEvent
from engine.output import StepOutput
from router import events as ev
from worker.attempts import Peer

if TYPE_CHECKING:
    from sim.router import SimRouter
    from sim.worker import SimWorker

FRESH_TOKENS = 3
"""Of an attempt on a worker, which go at once: routers learn from them how long the first gaps were."""
Addressed = tuple[str, ev.WorkerEvent]


class Talk:
    """`hold_s`: tokens of one attempt that follow each other sooner than this go in one message, all but its first few and
    its last: each carries its own time, so it is for nobody but the simulation, which spares a message per step and stream."""

    def __init__(self, worker: SimWorker, hold_s: float) -> None:
        self._worker = worker
        self._hold_s = hold_s
        self._held: dict[AttemptKey, list[TokenEvent]] = {}
        self._begins: dict[AttemptKey, int] = {}  # position of the first token here
        self._routers: dict[Peer, SimRouter] = {}

    def peer(self, router: SimRouter) -> Peer:
        peer = Peer(router.name, 1)
        self._routers[peer] = router
        return peer

    def attached(self, router: SimRouter) -> None:
        """Its session stands."""
        self._worker.table.connected(self.peer(router), self._worker.site.events.now())

    def detached(self, router: SimRouter) -> None:
        """Its session broke: what it has here is kept for the lease of sessions."""
        worker = self._worker
        lease_s = worker.site.config.router.session_lease_s
        worker.table.disconnected(self.peer(router), lease_s, worker.site.events.now())
        worker.feeds.end(router)

    def say(self, router: SimRouter, key: AttemptKey, event: ev.WorkerEvent) -> None:
        self._post(router, [(key.request_id, event)])

    def event(self, key: AttemptKey, event: ev.WorkerEvent) -> None:
        """To whoever owns the attempt; an attempt that is over says nothing."""
        owner = self._worker.table.owner(key)
        if owner is not None:
            self._post(self._routers[owner], [(key.request_id, event)])

    def refuse(self, router: SimRouter, key: AttemptKey, reason: str) -> None:
        """Of a command that cannot be carried out."""
        self.say(router, key, ev.AttemptFailed(self._worker.name, key.attempt, UnavailableError(reason), True))

    def fail(self, key: AttemptKey, error: TandemError) -> None:
        """Tells the router, and the attempt is over here; the caller frees what it holds."""
        worker = self._worker
        self.let_go(key)
        self.event(key, ev.AttemptFailed(worker.name, key.attempt, error, error.retryable))
        worker.table.end(key, worker.site.events.now())

    def lose(self, output: StepOutput) -> list[AttemptKey]:
        """What a step gave back or could not go on with; returns which."""
        for victim in output.given_back:
            self.fail(victim.key, OutOfBlocksError(victim.reason))
        for key, message, late in output.failed:
            self.fail(key, DeadlineExceededError(message) if late else InternalError(message))
        return [victim.key for victim in output.given_back] + [failed.key for failed in output.failed]

    def tokens(self, tokens: Iterable[TokenEvent]) -> None:
        """Of one step, or of several taken in one go: those of an attempt are together."""
        due = []
        for key, run in groupby(tokens, key=attrgetter("key")):
            held = self._held.setdefault(key, [])
            held += run
            fresh = held[0].position - self._begins.setdefault(key, held[0].position) < FRESH_TOKENS
            late = (held[-1].logprob or 0.0) - (held[0].logprob or 0.0) >= self._hold_s
            if fresh or late or held[-1].finish_reason is not None:
                due.append(key)
        self._send(due)

    def let_go(self, key: AttemptKey) -> None:
        """Nothing of it is held back any more."""
        if key in self._held:
            self._send([key])
        self._begins.pop(key, None)

    def let_all_go(self) -> None:
        self._send(list(self._held))

    def _send(self, keys: list[AttemptKey]) -> None:
        """What is held of these attempts, in one message to each router."""
        owner_of, name = self._worker.table.owner, self._worker.name
        by_owner: dict[Peer, list[Addressed]] = {}
        for key in keys:
            held, owner = self._held.pop(key), owner_of(key)
            if held[-1].finish_reason is not None:
                del self._begins[key]
            if owner is not None:
                by_owner.setdefault(owner, []).append((key.request_id, ev.Tokens(name, key.attempt, tuple(held))))
        for owner, events in by_owner.items():
            self._post(self._routers[owner], events)

    def _post(self, router: SimRouter, events: list[Addressed]) -> None:
        worker = self._worker
        worker.site.post.send(worker.name, router.name, router.heard, worker.name, worker.epoch, events)
