"""What a worker says to its routers: each message takes the link's latency, all tokens of a step go in one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from core.errors import DeadlineExceededError, InternalError, OutOfBlocksError, TandemError, UnavailableError
from core.request import AttemptKey, TokenEvent
from engine.output import StepOutput
from router import events as ev
from worker.attempts import Peer

if TYPE_CHECKING:
    from sim.router import SimRouter
    from sim.worker import SimWorker

Addressed = tuple[str, ev.WorkerEvent]


class Talk:
    def __init__(self, worker: SimWorker) -> None:
        self._worker = worker
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
        owner_of, name = self._worker.table.owner, self._worker.name
        by_owner: dict[Peer, list[Addressed]] = {}
        run: list[TokenEvent] = []
        last: AttemptKey | None = None
        for token in (*tokens, None):
            key = token.key if token is not None else None
            if key is not last and run and last is not None:
                owner = owner_of(last)
                if owner is not None:
                    addressed = (last.request_id, ev.Tokens(name, last.attempt, tuple(run)))
                    by_owner.setdefault(owner, []).append(addressed)
                run = []
            if token is not None:
                run.append(token)
                last = key
        for owner, events in by_owner.items():
            self._post(self._routers[owner], events)

    def _post(self, router: SimRouter, events: list[Addressed]) -> None:
        worker = self._worker
        worker.site.post.send(worker.name, router.name, router.heard, worker.name, worker.epoch, events)
