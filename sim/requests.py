"""What users see of their requests: the sink of each journey, added up when it ends."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

from core.errors import OverloadedError, TandemError
from core.request import FinishReason, Slo, TokenEvent
from core.tally import Outcome, Tally
from router.journey import Journey
from sim.prompt import STOP_ID, Content

_SLOWEST_SHARE = 10


class Request:
    """One request from arrival to its end. `times`: when each token reached the router."""

    __slots__ = ("arrived_at", "content", "ends", "failovers", "journey", "name", "slo", "times", "users")

    def __init__(self, name: str, content: Content, slo: Slo, arrived_at: float, users: Users) -> None:
        self.name = name
        self.content = content
        self.slo = slo
        self.arrived_at = arrived_at
        self.users = users
        self.times: list[float] = []
        self.journey: Journey | None = None
        self.ends = 0

    def accepted(self) -> None:
        """A worker took it."""

    def deliver(self, tokens: tuple[TokenEvent, ...]) -> None:
        """A token's logprob is the time at which it was sampled (`sim.executor`)."""
        times, way_s = self.times, self.users.way_s
        if self.users.checks is not None:
            self.users.checks(self, tokens)
        begun = len(times)
        for token in tokens:
            times.append((token.logprob or 0.0) + way_s)
        if begun < 2:
            self._held(begun)

    def _held(self, begun: int) -> None:
        """A first token that was kept came with the second, or when it could be kept no longer."""
        facts, times = self.journey.facts if self.journey is not None else None, self.times
        if facts is None or facts.held_since is None:
            return
        if not begun:
            times[0] = facts.first_token_at or times[0]
        if len(times) > 1:
            times[0] = min(times[0], times[1])

    def finish(self, reason: FinishReason | None, error: TandemError | None) -> None:
        self.ends += 1
        self.users.ended(self, reason, error)


class Users:
    """All requests: those under way by name, the others in `tally`. `way_s`: from worker to router."""

    def __init__(self, way_s: float, now: Callable[[], float]) -> None:
        self.way_s = way_s
        self.tally = Tally()
        self.live: dict[str, Request] = {}
        self.checks: Callable[[Request, tuple[TokenEvent, ...]], None] | None = None
        self.on_completed: Callable[[Request], None] = lambda request: None
        self.on_error: Callable[[Request, TandemError], None] = lambda request, error: None
        self.on_end: Callable[[Request], None] = lambda request: None
        self.prompt_tokens = self.cached_tokens = self.failovers = 0
        self.last_end = 0.0
        self.errors: dict[str, int] = {}
        self._now = now

    def began(self, request: Request) -> None:
        self.live[request.name] = request

    def ended(self, request: Request, reason: FinishReason | None, error: TandemError | None) -> None:
        del self.live[request.name]
        self.last_end = now = self._now()
        if error is not None:
            self.on_error(request, error)
            outcome = Outcome.REJECTED if isinstance(error, OverloadedError) else Outcome.FAILED
            self.errors[error.code] = self.errors.get(error.code, 0) + 1
            self.tally.add(outcome, request.slo, tokens=len(request.times))
        else:
            self._completed(request, now)
            self.on_completed(request)
        if request.journey is not None:
            facts = request.journey.facts
            self.prompt_tokens += request.content.input_tokens
            self.cached_tokens += facts.cached_tokens
            self.failovers += facts.failovers
        self.on_end(request)

    def _completed(self, request: Request, now: float) -> None:
        times = request.times
        count = len(times) - 1
        gaps = sorted([later - earlier for earlier, later in pairwise(times)], reverse=True)
        tbt_s = tpot_s = None
        if gaps:
            slowest = math.ceil(count / _SLOWEST_SHARE)
            tbt_s = sum(gaps[:slowest]) / slowest
            tpot_s = (times[-1] - times[0]) / count
            self._count(gaps)
        ttft_s = times[0] - request.arrived_at if times else None
        e2e_s = times[-1] - request.arrived_at if times else now - request.arrived_at
        self.tally.add(Outcome.COMPLETED, request.slo, ttft_s, tbt_s, tpot_s, e2e_s, len(times))

    def _count(self, gaps: list[float]) -> None:
        """Gaps of one request are nearly alike: sorted, equal ones are counted together."""
        add, start, size = self.tally.gaps.add, 0, len(gaps)
        while start < size:
            gap, end = gaps[start], start + 1
            while end < size and gaps[end] > gap * 0.999:
                end += 1
            add(sum(gaps[start:end]) / (end - start), end - start)
            start = end

    def mistake(self, request: Request, tokens: tuple[TokenEvent, ...]) -> str:
        """What is wrong with these tokens at this moment of the request; empty when nothing is."""
        have, times = len(request.times), request.times
        before_s = times[-1] if times else request.arrived_at
        if have == 1 and request.journey is not None and request.journey.facts.held_since is not None:
            before_s = request.arrived_at  # the first one was kept while this one was on its way
        for place, token in enumerate(tokens, have):
            if token.position != place:
                return f"token {token.position} of {request.name} was delivered where {place} was due"
            ends = place == request.content.output_tokens - 1
            if token.token_id != 1 and token.token_id not in (STOP_ID, request.content.token(place)):
                return f"token {place} of {request.name} is another one than it must be"
            if (token.logprob or 0.0) + self.way_s < before_s - 1e-9:
                return f"token {place} of {request.name} came before the one before it ({token.logprob}, {before_s})"
            if place >= request.content.output_tokens or (token.token_id == STOP_ID and not ends):
                return f"{request.name} went on after its last token, or ended before it"
        return ""
