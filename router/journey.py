"""The journey of one choice of one request, from waiting for a place to its last token. Deciding code: no clock, no I/O.

    QUEUED ──Placed(pair)──> RESERVING ──Reserved──> PREFILLING ──Opened──> HANDOFF ──Joined──> DECODING ──┐
      │ ^  └─Placed(one)───> LOCAL ────────────────────────────────────────────────────────────────────────┤ last token
      │ └── refused, failed, worker lost: place again with the tokens so far ── any of the above           v
      └── deadline, cancel, too many failures ─────────────────────────────────────────────────────────>  DONE

`handle(now, event)` returns the commands to carry out, in order. A new attempt gets a new number; what older attempts
still say is ignored, and every worker an attempt was started on either ended it or is sent a cancel, unless it was lost.
The token log makes failover invisible: the next attempt starts from prompt + tokens so far, and the log admits each
position once.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto
from typing import Any, ClassVar

from core.errors import OutOfBlocksError, OverloadedError, TandemError, TransferError, UnavailableError
from core.request import AttemptKey, FinishReason, TokenEvent
from router import events as ev
from router.attempt import Attempt, JourneySpec, Limits
from router.deadlines import Deadlines
from router.events import Command, Event
from router.facts import Facts
from router.shunned import Shunned
from router.tokenlog import TokenLog
from router.view import NO_CLAIM, Claim


class State(Enum):
    QUEUED = auto()
    RESERVING = auto()
    PREFILLING = auto()
    HANDOFF = auto()
    DECODING = auto()
    LOCAL = auto()
    DONE = auto()


class Journey:
    """`wake_at` is when a Tick is due; `claim` is what the journey occupies, replaced by a new value when it changes."""

    def __init__(self, spec: JourneySpec, limits: Limits, now: float) -> None:
        self.spec = spec
        self.state = State.QUEUED
        self.facts = Facts(arrived_at=now)
        self.claim: Claim = NO_CLAIM
        self.log = TokenLog(spec.max_tokens, spec.stop_ids())
        self._limits = limits.of(spec)
        self._deadlines = Deadlines(self._limits, now)
        self._attempt: Attempt | None = None
        self.next_attempt = spec.first_attempt
        self._shunned = Shunned()
        self._doubted = False  # a worker that computes it all may still say no
        self._why_waiting = "no worker is connected"
        self._busy = True
        self._held: tuple[TokenEvent, ...] = ()

    # ---- what a driver reads ---------------------------------------------------------------------------------------

    @property
    def wake_at(self) -> float:
        if self.state is State.QUEUED:
            return min(self._deadlines.wake_at(queued=True), self._shunned.retry_at)
        return self._deadlines.wake_at(queued=False)

    def held_on(self, worker: str) -> AttemptKey | None:
        """The attempt that may still run on `worker`."""
        attempt = self._attempt
        return attempt.key if attempt is not None and worker in attempt.legs else None

    # ---- the machine -----------------------------------------------------------------------------------------------

    def handle(self, now: float, event: Event) -> list[Command]:
        out: list[Command] = []
        if self.state is not State.DONE:
            self._HANDLERS[type(event)](self, now, event, out)
        return out

    def run_on(self, now: float, event: ev.Tokens) -> bool:
        """Takes tokens, to be delivered, that change nothing but the log. False: the event is for `handle`."""
        attempt = self._attempt
        if attempt is None or attempt.key.attempt != event.attempt or event.worker not in attempt.legs or self._doubted:
            return False
        if self._held or self._first_token_missing(attempt) or not self.log.run_on(event.tokens):
            return False
        self.facts.tokens(now, len(event.tokens))
        return True

    def _on_woken(self, now: float, _: ev.Woken, out: list[Command]) -> None:
        if self.state is State.QUEUED:
            self._shunned.woken()
            self._ask_for_place(now, out)

    def _ask_for_place(self, now: float, out: list[Command]) -> None:
        out.append(ev.Place(self._shunned.look(now)))

    def _on_placed(self, now: float, event: ev.Placed, out: list[Command]) -> None:
        if self.state is not State.QUEUED:
            return
        item = self.spec.item(self.next_attempt, tuple(self.log.ids), self._deadlines.end - now)
        self.next_attempt += 1
        self._attempt = attempt = Attempt(item, event.prefill, event.decode, event.hold_until)
        attempt.legs.add(event.decode)
        self.facts.placed(event.prefill or event.decode, event.decode)
        if event.prefill is None:
            self.state = State.LOCAL
            self.claim = Claim(event.decode, len(item.token_ids), event.decode, len(item.token_ids))
            self._started(now, out, ev.SendGenerateLocal(event.decode, item))
        else:
            self.state = State.RESERVING
            self._deadlines.answer = now + self._limits.answer_timeout_s
            self.claim = Claim(event.prefill, len(item.token_ids), event.decode, len(item.token_ids))
            out.append(ev.SendReserve(event.decode, item))

    def _started(self, now: float, out: list[Command], command: Command) -> None:
        self._deadlines.answer = None
        self.facts.sent(now)
        out.append(command)
        if self.state is not State.LOCAL or not self._doubted:
            out.append(ev.Accepted())

    def _computes(self, out: list[Command]) -> None:
        """A worker is at it, so it does not refuse any more."""
        if self.state is State.LOCAL and self._doubted:
            self._doubted = False
            out.append(ev.Accepted())

    def _on_no_place(self, now: float, event: ev.NoPlace, out: list[Command]) -> None:
        self._why_waiting = event.reason
        self._busy = event.busy

    def _on_reserved(self, now: float, event: ev.Reserved, out: list[Command]) -> None:
        attempt = self._current(event.attempt)
        if attempt is None or self.state is not State.RESERVING:
            return
        if not event.granted:
            attempt.legs.discard(event.worker)
            self._turned_down(now, event.worker, event.reason or "the decode workers are full", out)
            return
        assert attempt.prefill is not None
        attempt.legs.add(attempt.prefill)
        self.state = State.PREFILLING
        self._started(now, out, ev.SendStartPrefill(attempt.prefill, attempt.item))
        self._deadlines.answer = now + self._limits.opened_timeout_s

    def _on_opened(self, now: float, event: ev.Opened, out: list[Command]) -> None:
        attempt = self._current(event.attempt)
        if attempt is None or self.state is not State.PREFILLING:
            return
        self.state = State.HANDOFF
        self._deadlines.answer = None
        self.facts.cached(event.cached_tokens)
        out.append(ev.SendOpenHandoff(attempt.decode, attempt.key, event.ticket))

    def _on_tokens(self, now: float, event: ev.Tokens, out: list[Command]) -> None:
        attempt = self._current(event.attempt)
        if attempt is None or event.worker not in attempt.legs:
            return
        if event.tokens and event.tokens[-1].finish_reason in (FinishReason.CANCELLED, FinishReason.ERROR):
            attempt.legs.discard(event.worker)
            self._lose(now, event.worker, "the worker gave the request up", out)
            return
        self._computes(out)
        first = self._first_token_missing(attempt)
        if first and event.worker == (attempt.prefill or attempt.decode):
            self.claim = Claim(None, 0, attempt.decode, len(attempt.item.token_ids))  # the prompt is computed
        accepted, gap = self.log.accept(event.tokens, hold=first and attempt.prefill is not None)
        if accepted:
            if attempt.keeps(now, self.log):
                self._held, self._deadlines.held, self.facts.held_since = accepted, attempt.hold_until, now
            else:
                self._give(now, accepted, out)
            if self.log.finished is not None:
                self._on_last_token(now, event, attempt, out)
                return
            if first and self.state is not State.PREFILLING:
                self._deadlines.answer = None
                self._drop_prefill_leg(attempt)
        if gap or (self.log.waits_for_earlier and not self._first_token_missing(attempt)):
            self._lose(now, event.worker, f"tokens are missing before position {event.tokens[-1].position}", out)
        elif self.log.waits_for_earlier and self._deadlines.answer is None:
            self._deadlines.answer = now + self._limits.answer_timeout_s

    def _give(self, now: float, tokens: tuple[TokenEvent, ...], out: list[Command]) -> None:
        """To the user, behind the first one where it was kept."""
        tokens = self._held + tokens
        self._held, self._deadlines.held = (), None
        if tokens:
            self.facts.tokens(now, len(tokens))
            out.append(ev.Deliver(tokens))

    def _on_last_token(self, now: float, event: ev.Tokens, attempt: Attempt, out: list[Command]) -> None:
        if event.worker == attempt.decode and event.tokens[-1].finish_reason is not None:
            attempt.legs.discard(event.worker)  # it ended the request itself
        self._finish(now, out, reason=self.log.finished)

    def _first_token_missing(self, attempt: Attempt) -> bool:
        return len(self.log) <= attempt.base

    def _drop_prefill_leg(self, attempt: Attempt) -> None:
        """Decode holds the whole KV and we hold prefill's token: prefill's fate is of no interest any more."""
        if self.state is State.DECODING and not self._first_token_missing(attempt):
            assert attempt.prefill is not None
            attempt.legs.discard(attempt.prefill)

    def _on_prefill_done(self, now: float, event: ev.PrefillDone, out: list[Command]) -> None:
        attempt = self._current(event.attempt)
        if attempt is not None:
            self._computes(out)
            self.claim = Claim(None, 0, attempt.decode, len(attempt.item.token_ids))
            self.facts.prefill_done(event.timing, event.cached_tokens)

    def _on_joined(self, now: float, event: ev.Joined, out: list[Command]) -> None:
        attempt = self._current(event.attempt)
        if attempt is None:
            return
        self.facts.joined(event.timing)
        if self.state is State.HANDOFF:
            self.state = State.DECODING
            self._drop_prefill_leg(attempt)
            if self._first_token_missing(attempt):  # prefill's token is still on its way to us
                self._deadlines.answer = now + self._limits.answer_timeout_s

    def _on_failed(self, now: float, event: ev.AttemptFailed, out: list[Command]) -> None:
        attempt = self._current(event.attempt)
        if attempt is None or event.worker not in attempt.legs:
            return
        attempt.legs.discard(event.worker)
        if not event.retryable:
            self._finish(now, out, error=event.error)
            return
        if isinstance(event.error, OutOfBlocksError | OverloadedError):
            begun = self.state in (State.HANDOFF, State.DECODING) or not self._first_token_missing(attempt)
            if self.state is State.LOCAL and not begun:
                self._doubted = True
                self._turned_down(now, event.worker, event.error.message, out)
                return
            self._lose(now, event.worker, event.error.message, out, counts=False, failover=begun)
            return
        if isinstance(event.error, TransferError) and attempt.prefill is not None:
            self._shunned.failed(attempt.prefill, now)  # the fault may be at either end
        self._lose(now, event.worker, event.error.message, out)

    def _on_lost(self, now: float, event: ev.WorkerLost, out: list[Command]) -> None:
        attempt = self._attempt
        if attempt is None:
            return
        next_leg = self.state is State.RESERVING and event.worker == attempt.prefill
        if next_leg or event.worker in attempt.legs:
            attempt.legs.discard(event.worker)
            self._lose(now, event.worker, event.reason, out)

    def _on_ended(self, now: float, event: ev.StopMatched | ev.ClientCancelled, out: list[Command]) -> None:
        self._finish(now, out, reason=FinishReason.STOP if isinstance(event, ev.StopMatched) else FinishReason.CANCELLED)

    def _on_turned_away(self, now: float, event: ev.Refused, out: list[Command]) -> None:
        self._finish(now, out, error=event.error)

    def _on_tick(self, now: float, _: ev.Tick, out: list[Command]) -> None:
        queued = self.state is State.QUEUED
        error = self._deadlines.missed(now, queued=queued, why_waiting=self._why_waiting, busy=self._busy)
        if error is not None:
            self._finish(now, out, error=error)
            return
        if self._deadlines.held is not None and now >= self._deadlines.held:
            self._give(now, (), out)
        if queued:
            if now >= self._shunned.retry_at:
                self._ask_for_place(now, out)
        elif self._deadlines.unanswered(now):
            attempt = self._attempt
            assert attempt is not None
            late = attempt.decode if self.state is State.RESERVING else attempt.prefill or attempt.decode
            self._lose(now, late, f"{late} did not answer in time", out)

    # ---- leaving an attempt, leaving for good ----------------------------------------------------------------------

    def _current(self, attempt: int) -> Attempt | None:
        mine = self._attempt
        return mine if mine is not None and mine.key.attempt == attempt else None

    def _leave_attempt(self, now: float, out: list[Command]) -> None:
        self._give(now, (), out)
        attempt, self._attempt = self._attempt, None
        if attempt is not None:
            out += (ev.SendCancel(worker, attempt.key) for worker in sorted(attempt.legs))
        self.log.forget_early()
        self.state = State.QUEUED
        self._deadlines.answer = None
        self.claim = NO_CLAIM

    def _turned_down(self, now: float, worker: str, why: str, out: list[Command]) -> None:
        """It has no room."""
        self._shunned.refused(worker)
        self._why_waiting = why
        self._leave_attempt(now, out)
        self._ask_for_place(now, out)

    def _lose(
        self, now: float, worker: str, why: str, out: list[Command], *, counts: bool = True, failover: bool = True
    ) -> None:
        """The attempt is over; ask for the next place, elsewhere than `worker` for a while.

        A shortage does not count against `max_attempts`, and one met before anything was computed is no failover either.
        """
        self._leave_attempt(now, out)
        self.facts.failovers += failover
        if not failover:
            self.facts.turned_down()
        self._shunned.failures += counts
        self._shunned.failed(worker, now)
        self._deadlines.seek(now)
        self._why_waiting = why
        if self._shunned.failures >= self._limits.max_attempts:
            text = f"{self._shunned.failures} placements failed (router.max_attempts), the last one because {why}"
            self._finish(now, out, error=UnavailableError(text, retry_after_s=1.0))
        else:
            self._ask_for_place(now, out)

    def _finish(
        self, now: float, out: list[Command], *, reason: FinishReason | None = None, error: TandemError | None = None
    ) -> None:
        self._leave_attempt(now, out)
        self.state = State.DONE
        self.facts.finished_at = now
        out.append(ev.Finish(reason, error))

    _HANDLERS: ClassVar[dict[type, Callable[[Journey, float, Any, list[Command]], None]]] = {
        ev.Woken: _on_woken,
        ev.Placed: _on_placed,
        ev.NoPlace: _on_no_place,
        ev.Reserved: _on_reserved,
        ev.Opened: _on_opened,
        ev.Tokens: _on_tokens,
        ev.PrefillDone: _on_prefill_done,
        ev.Joined: _on_joined,
        ev.AttemptFailed: _on_failed,
        ev.WorkerLost: _on_lost,
        ev.StopMatched: _on_ended,
        ev.ClientCancelled: _on_ended,
        ev.Refused: _on_turned_away,
        ev.Tick: _on_tick,
    }
