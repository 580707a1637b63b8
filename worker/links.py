"""The routers this worker serves: their attempts, what they are still to be told, and how attempts ended."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from core.clock import Clock
from core.errors import DeadlineExceededError, InternalError, OutOfBlocksError, TandemError
from core.request import AttemptKey, TokenEvent
from engine.output import StepOutput
from worker.attempts import Admitted, AttemptTable, Peer, Refused
from worker.messages import AttemptEvent, AttemptFailed, Event, PrefillDone, StepTokens
from worker.outbox import Outbox

log = logging.getLogger(__name__)

OUTBOX_EVENTS_MAX = 8192


@dataclass(slots=True)
class _Link:
    outbox: Outbox
    lease_s: float
    attached: bool = True


class RouterLinks:
    """Routes events to the router that owns an attempt. Used from the asyncio thread only; nothing here waits but `drained`.

    Whatever takes an attempt away from outside its own course (cancel, superseded, lease over, router given up) calls
    `stop_attempt`, which frees what the attempt holds. Events of an attempt that is no longer live are dropped.
    """

    def __init__(self, clock: Clock, *, outbox_bound: int = OUTBOX_EVENTS_MAX) -> None:
        self.table = AttemptTable()
        self.outcomes: Counter[str] = Counter()
        self.tokens_sent = 0
        self.accepting = True
        self._clock = clock
        self._bound = outbox_bound
        self._links: dict[Peer, _Link] = {}
        self._stop_attempt: Callable[[AttemptKey], None] = lambda key: None
        self._emptied = asyncio.Event()
        self._emptied.set()

    def bind(self, stop_attempt: Callable[[AttemptKey], None]) -> None:
        """`stop_attempt` frees an attempt's resources; it must be idempotent and must not raise."""
        self._stop_attempt = stop_attempt

    # ---- sessions

    def attach(self, peer: Peer, lease_s: float) -> Outbox:
        """The peer's session stands: returns the box to empty into it, with what was left by its previous session."""
        link = self._links.get(peer)
        outbox = Outbox(self._bound) if link is None else link.outbox.hand_over()
        self._links[peer] = _Link(outbox, lease_s)
        self._stop(self.table.connected(peer, self._clock.now()), "orphaned")
        return outbox

    def detach(self, peer: Peer, outbox: Outbox) -> None:
        """A session ended. Its attempts are kept for the lease it was opened with; no-op when another one took over."""
        link = self._links.get(peer)
        if link is None or link.outbox is not outbox:
            return
        link.attached = False
        self.table.disconnected(peer, link.lease_s, self._clock.now())
        self._forget_if_idle(peer)

    def backlog(self, peer: Peer) -> int | None:
        """Events that this router has yet to read; None when it has no session."""
        link = self._links.get(peer)
        return len(link.outbox) if link is not None and link.attached else None

    def expire(self) -> None:
        """Called now and then: ends the attempts of routers that stayed away too long."""
        self._stop(self.table.expire(self._clock.now()), "orphaned")

    def close(self) -> None:
        """Ends every session once what is owed has been written."""
        for link in self._links.values():
            link.outbox.close()

    # ---- attempts

    def admit(self, key: AttemptKey, peer: Peer) -> Refused | None:
        """Lets an attempt in, cancelling an older one of its request; the reason when it may not run."""
        if not self.accepting:
            self.outcomes["refused"] += 1
            return Refused("this worker is draining")
        answer = self.table.admit(key, peer, self._clock.now())
        if isinstance(answer, Refused):
            self.outcomes["refused"] += 1
            return answer
        self._emptied.clear()
        if isinstance(answer, Admitted) and answer.superseded is not None:
            self._stop([answer.superseded], "superseded")
        return None

    def cancel(self, key: AttemptKey) -> None:
        running = self.table.cancel(key, self._clock.now())
        if running is not None:
            self._stop([running], "cancelled")

    def cancel_all(self, outcome: str) -> None:
        """Ends everything that runs here (the grace time is over)."""
        keys = [key for key in self.table.live() if self.table.end(key, self._clock.now())]
        self._stop(keys, outcome)

    def is_live(self, key: AttemptKey) -> bool:
        return self.table.owner(key) is not None

    def finish(self, key: AttemptKey, outcome: str = "finished") -> None:
        """The attempt ended by itself and holds nothing any more; idempotent."""
        owner = self.table.owner(key)
        if owner is not None:
            self.table.end(key, self._clock.now())
            self._ended(outcome)
            self._forget_if_idle(owner)

    def fail(self, key: AttemptKey, error: TandemError) -> None:
        """Tells the router and ends the attempt; the caller frees what it holds."""
        self.send(AttemptFailed(key, error.code, error.message, error.retryable))
        self.finish(key, "failed")

    def lose(self, output: StepOutput) -> list[AttemptKey]:
        """Tells routers of the attempts that a step gave back or could not go on with; returns which, their owners' to free."""
        for victim in output.given_back:
            self.fail(victim.key, OutOfBlocksError(victim.reason))
        for key, message, late in output.failed:
            self.fail(key, DeadlineExceededError(message) if late else InternalError(message))
        return [victim.key for victim in output.given_back] + [failed.key for failed in output.failed]

    async def drained(self) -> None:
        """Returns when no attempt is live."""
        await self._emptied.wait()

    # ---- events

    def send(self, event: AttemptEvent) -> None:
        owner = self.table.owner(event.key)
        if owner is not None:
            self.reply(owner, event)

    def send_step(self, output: StepOutput) -> None:
        """Tokens, and what prompts took behind them; of an answer that ends with its first token before it: nobody listens
        after that one."""
        over = {token.key for token in output.tokens if token.finish_reason is not None}
        done = [PrefillDone(one.key, one.timing, one.cached_tokens) for one in output.prefilled]
        for event in done:
            if event.key in over:
                self.send(event)
        self.send_tokens(output.tokens)
        for event in done:
            if event.key not in over:
                self.send(event)

    def send_tokens(self, tokens: Iterable[TokenEvent]) -> None:
        """All tokens of one engine step: one message per router."""
        by_peer: dict[Peer, list[TokenEvent]] = {}
        for token in tokens:
            owner = self.table.owner(token.key)
            if owner is not None:
                by_peer.setdefault(owner, []).append(token)
        for peer, batch in by_peer.items():
            self.tokens_sent += len(batch)
            self.reply(peer, StepTokens(tuple(batch)))

    def reply(self, peer: Peer, event: Event) -> None:
        """Queues an event for one router; a router that is too far behind is given up with all it has here."""
        link = self._links.get(peer)
        if link is None or link.outbox.put(event):
            return
        log.warning("router %s reads too slowly: %d events wait; its attempts end", peer.peer_id, len(link.outbox))
        del self._links[peer]
        link.outbox.close()
        self._stop(self.table.drop(peer, self._clock.now()), "orphaned")

    def _stop(self, keys: Iterable[AttemptKey], outcome: str) -> None:
        for key in keys:
            self._ended(outcome)
            self._stop_attempt(key)
        for peer in [peer for peer, link in self._links.items() if not link.attached]:
            self._forget_if_idle(peer)

    def _ended(self, outcome: str) -> None:
        self.outcomes[outcome] += 1
        if not len(self.table):
            self._emptied.set()

    def _forget_if_idle(self, peer: Peer) -> None:
        link = self._links.get(peer)
        if link is not None and not link.attached and not self.table.owned_by(peer):
            link.outbox.close()
            del self._links[peer]
