"""One request while it runs: its choices, what its reader has not fetched yet, and its end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from core.clock import Clock
from core.errors import CancelledError, TandemError
from core.request import FinishReason, TokenEvent
from router import events as ev
from router.attainment import Felt, Gaps
from router.attempt import JourneySpec
from router.choice import ChoiceText
from router.dispatch import Dispatcher
from router.facts import Facts
from router.frontend_types import ChoiceFinished, Finished, Part, Placement, Started, Timing, Token, TokenBatch, Usage
from router.journey import Journey
from router.metrics import RouterStats
from router.policy import Pair
from router.turns import Turns

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunSpec:
    """`journey` is that of choice 0; the others differ in request id and choice."""

    request_id: str
    journey: JourneySpec
    prompt_text: str  # empty unless echo was asked
    slow_client_s: float
    arrived_at: float


class Run:
    """Owned by the generator that yields its parts. Everything on the asyncio thread.

    Tokens wait in one batch until the reader comes, so a reader that lags gets fewer, larger parts and slows nobody; the
    memory is bounded by the request's max_tokens. A reader that stays away for `slow_client_s` is cancelled.
    """

    def __init__(
        self,
        spec: RunSpec,
        dispatcher: Dispatcher,
        stats: RouterStats,
        clock: Clock,
        text_of: Callable[[int], ChoiceText],
        turns: Turns,
    ) -> None:
        self.spec = spec
        self.error: TandemError | None = None
        self.over = False
        self._dispatcher = dispatcher
        self._stats = stats
        self._clock = clock
        self._text_of = text_of
        self._turns = turns
        self._choices: list[_Choice] = []
        self._unfinished = spec.journey.sampling.n
        self._cancelled = False
        self._started = False
        self._parts: list[Part] = []
        self._tokens: list[Token] = []
        self._waiter: asyncio.Future[None] | None = None
        self._unread_since: float | None = None
        self._watchdog: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """Starts choice 0. Raises OverloadedError when it could not even wait."""
        self._start_choice(0, None)
        self._watch_reader()

    async def next_parts(self) -> list[Part]:
        """What has come since the last call, waiting for something if need be; a journey's deadlines bound the wait.

        Empty once everything was returned. Raises the error the request ended with, after the parts before it.
        """
        while not (self._parts or self._tokens):
            if self.error is not None:
                raise self.error
            if self.over:
                return []
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        self._flush_tokens()
        parts, self._parts = self._parts, []
        self._unread_since = None
        return parts

    def cancel(self) -> None:
        """By the user's wish: unfinished choices end with CANCELLED."""
        for choice in list(self._choices):
            choice.signal(ev.ClientCancelled())

    def close(self) -> None:
        """The reader has gone: whatever still runs is cancelled, nothing is kept."""
        if self._watchdog is not None:
            self._watchdog.cancel()
        self.cancel()

    @property
    def attempts_used(self) -> int:
        """The highest attempt number of any choice."""
        return max((choice.journey.next_attempt - 1 for choice in self._choices if choice.journey), default=0)

    # ---- what the choices say --------------------------------------------------------------------------------------

    def accepted(self) -> None:
        if not self._started:
            self._started = True
            journey = self.spec.journey
            seed = journey.sampling.seed
            assert seed is not None
            self._put(Started(self.spec.request_id, len(journey.prompt), seed, self.spec.prompt_text))

    def delivered(self, tokens: list[Token]) -> None:
        self._tokens += tokens
        self._wake()

    def first_token(self, facts: Facts) -> None:
        """Choice 0 has its first token, so its prompt is cached where it runs: the other choices follow it there."""
        where = facts.placement
        pair = Pair(None if where.prefill == where.decode else where.prefill, where.decode)
        for choice in range(1, self.spec.journey.sampling.n):
            if not self.over:
                self._start_choice(choice, pair)

    def finished(self, choice: int, reason: FinishReason, tail: str) -> None:
        self._put(ChoiceFinished(choice, reason, self._fold(choice, tail)))
        self._unfinished -= 1
        self._cancelled |= reason is FinishReason.CANCELLED
        if choice == 0 and len(self._choices) < self.spec.journey.sampling.n and reason is FinishReason.CANCELLED:
            for late in range(len(self._choices), self.spec.journey.sampling.n):  # cancelled before they began
                self._put(ChoiceFinished(late, reason, ""))
                self._unfinished -= 1
        if self._unfinished == 0 and not self.over:
            self._end()

    def failed(self, error: TandemError) -> None:
        if not self.over:
            self.over = True
            self.error = error
            self._stats.failed(error)
            self._stats.attainment.failed(self.spec.journey.slo_class, error)
            self.cancel()
            self._wake()

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _start_choice(self, number: int, prefer: Pair | None) -> None:
        spec = self.spec.journey
        if number:
            spec = replace(spec, request_id=f"{spec.request_id}/{number}", choice=number, deadline_s=self._left_s())
        choice = _Choice(self, number, self._text_of(number), self._stats, self._clock)
        self._choices.append(choice)
        choice.begin(self._dispatcher, spec, prefer)

    def _left_s(self) -> float | None:
        """Of the deadline, for a choice that begins now."""
        deadline_s = self.spec.journey.deadline_s
        return None if deadline_s is None else max(self.spec.arrived_at + deadline_s - self._clock.now(), 1e-3)

    def _end(self) -> None:
        facts = [choice.journey.facts for choice in self._choices if choice.journey is not None]
        first = facts[0]
        completion_tokens = sum(choice.text.num_tokens for choice in self._choices)
        usage = Usage(len(self.spec.journey.prompt), first.cached_tokens, completion_tokens)
        timing = first.timing(self._clock.now())
        self._put(Finished(usage, timing, first.placement, sum(f.failovers for f in facts)))
        self._stats.completed(timing, usage)
        self._count(timing, first.placement)
        self.over = True
        self._wake()

    def _count(self, timing: Timing, placement: Placement) -> None:
        journey, attainment = self.spec.journey, self._stats.attainment
        if self._cancelled:
            attainment.cancelled(journey.slo_class)
        else:
            felt = Felt.of(timing.ttft_s or None, [choice.gaps for choice in self._choices])
            attainment.completed(journey.slo_class, journey.slo, felt)
            attainment.spent(timing, split=placement.prefill != placement.decode)

    def _put(self, part: Part) -> None:
        if not self._started:
            self.accepted()
        self._flush_tokens()
        self._parts.append(part)
        self._wake()

    def _fold(self, choice: int, tail: str) -> str:
        """Held-back text joins the choice's last token while that is still here, so that tokens alone make the whole text.

        Returns what remains to be said with the end: the tail, when its token has gone already.
        """
        for index in reversed(range(len(self._tokens))) if tail else ():
            token = self._tokens[index]
            if token.choice == choice:
                self._tokens[index] = token._replace(text=token.text + tail)
                return ""
        return tail

    def _flush_tokens(self) -> None:
        if self._tokens:
            self._parts.append(TokenBatch(tuple(self._tokens)))
            self._tokens.clear()

    def _wake(self) -> None:
        if self._unread_since is None:
            self._unread_since = self._clock.now()
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            self._turns.wake(waiter)

    def _watch_reader(self) -> None:
        """Rings a few times per `slow_client_s`, whatever the token rate."""
        slow_s = self.spec.slow_client_s
        since = self._unread_since
        if since is not None and self._clock.now() - since >= slow_s and not self.over:
            log.warning("request %s: its client read nothing for %g s and is cancelled", self.spec.request_id, slow_s)
            self.failed(CancelledError(f"the client read nothing for {slow_s:g} s (router.slow_client_s)"))
        elif not self.over:
            self._watchdog = asyncio.get_running_loop().call_later(slow_s / 4, self._watch_reader)


class _Choice:
    """The sink of one journey."""

    def __init__(self, run: Run, number: int, text: ChoiceText, stats: RouterStats, clock: Clock) -> None:
        self.text = text
        self.journey: Journey | None = None
        self.gaps = Gaps()
        self._run = run
        self._number = number
        self._stats = stats
        self._clock = clock
        self._id = ""
        self._dispatcher: Dispatcher | None = None
        self._last_at: float | None = None

    def begin(self, dispatcher: Dispatcher, spec: JourneySpec, prefer: Pair | None) -> None:
        self._dispatcher, self._id = dispatcher, spec.request_id
        arrived_at = self._clock.now() if self._number else self._run.spec.arrived_at
        self.journey = dispatcher.start(spec, self, arrived_at, prefer=prefer, admitted=self._number > 0)

    def signal(self, event: ev.StopMatched | ev.ClientCancelled) -> None:
        if self._dispatcher is not None:
            self._dispatcher.signal(self._id, event)

    def accepted(self) -> None:
        self._run.accepted()

    def deliver(self, tokens: tuple[TokenEvent, ...]) -> None:
        if self.text.stopped or self._run.over:
            return
        self._observe(len(tokens))
        self._run.delivered(self.text.take(tokens))
        if self.text.stopped:
            self.signal(ev.StopMatched())

    def finish(self, reason: FinishReason | None, error: TandemError | None) -> None:
        if error is not None:
            self._run.failed(error)
        elif reason is not None and not self._run.over:
            self._run.finished(self._number, *self.text.end(reason))

    def _observe(self, count: int) -> None:
        now = self._clock.now()
        self._stats.tokens += count
        if self._last_at is not None:
            self._stats.gaps(now - self._last_at, count)
            self.gaps.add(now - self._last_at, count)
        else:
            self.gaps.joined(count - 1)
            if self._number == 0 and self.journey is not None:
                self._run.first_token(self.journey.facts)
        self._last_at = now
