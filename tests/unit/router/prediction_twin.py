"""One prefill and one decode worker on a virtual clock, placed on by the real policy: how far off predictions are where steps
take exactly what their cost says. What remains is what the router cannot know: who comes next, and how long answers become."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from test_placing import D, P, worker

from core.cost_model import StepCost, pairs
from core.request import AttemptTiming
from router.calibration import Calibration
from router.facts import Facts
from router.goodput import Goodput
from router.lengths import Lengths
from router.policy import Candidate, Need, Pair
from router.situation import Situation
from router.view import NO_CLAIM, Claim, Claims, ClusterView

CHUNK = 256
HOP_S = 0.002
REPORT_S = 0.5


@dataclass
class Request:
    prompt: int
    answer: int
    facts: Facts
    chosen: Candidate | None = None
    claim: Claim = NO_CLAIM
    computed: int = 0
    tokens: int = 0
    sent_at: float = 0.0
    begun_at: float | None = None


@dataclass
class Twin:
    """`cost` is what steps take, `believed` what the workers say of it."""

    cost: StepCost
    believed: StepCost
    rate: float
    seed: int = 0
    now: float = 0.0
    done: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.claims, self.calibration, self.lengths = Claims(), Calibration(), Lengths()
        self.prefilling: deque[Request] = deque()
        self.decoding: list[Request] = []
        self.joining: list[Request] = []
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._busy = {"p0": False, "d0": False}
        self._report()
        self._at(self.rng.expovariate(self.rate), self._arrive)

    def run(self, requests: int) -> list[Request]:
        while len(self.done) < requests:
            self.now, _, event = heapq.heappop(self._events)
            event()
        return self.done

    def _at(self, delay_s: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + delay_s, next(self._numbers), event))

    def _report(self) -> None:
        waiting = sum(r.prompt - r.computed for r in self.prefilling)
        context = sum(r.prompt + r.tokens for r in self.decoding)
        prefill = worker("p0", P, step_cost=self.believed, waiting_tokens=waiting, running=0)
        decode = worker("d0", D, step_cost=self.believed, running=len(self.decoding), context_tokens=context)
        workers = {one.worker_id: replace(one, blocks_free=9999, blocks_total=9999) for one in (prefill, decode)}
        view = ClusterView(1, MappingProxyType(workers))
        self.situation = Situation(view, frozenset(workers), self.claims, None, 3.0, self.now, self.calibration)
        self._at(REPORT_S, self._report)

    def _arrive(self) -> None:
        self._at(self.rng.expovariate(self.rate), self._arrive)
        prompt = min(900, max(16, round(220 * self.rng.lognormvariate(0, 0.8))))
        answer = min(240, max(4, round(60 * self.rng.lognormvariate(0, 0.6))))
        request = Request(prompt, answer, Facts(self.now))
        need = Need(prompt, output_tokens=self.lengths.predict("", answer).median, now=self.now, prefer=Pair("p0", "d0"))
        decision = Goodput().decide(self.situation, replace(need, prefer=None))
        request.chosen = next((one for one in decision.candidates if one.pair == need.prefer), None)
        if request.chosen is None:
            return  # a full window: the router would have it wait, and predict later
        self._move(request, Claim("p0", prompt, "d0", prompt))
        self._at(HOP_S, lambda: self._sent(request))

    def _sent(self, request: Request) -> None:
        request.sent_at = self.now
        self.prefilling.append(request)
        if not self._busy["p0"]:
            self._prefill_step()

    def _prefill_step(self) -> None:
        self._busy["p0"] = bool(self.prefilling)
        left, took_s, work = CHUNK, self.cost.base_s, []
        for request in self.prefilling:
            count = min(left, request.prompt - request.computed)
            if not count:
                break
            if request.begun_at is None:
                request.begun_at = self.now
            took_s += self.cost.prefill_token_s * count + self.cost.prefill_pair_s * pairs(count, request.computed)
            left -= count
            work.append((request, count))
        if work:
            self._at(took_s, lambda: self._prefill_stepped(work))

    def _prefill_stepped(self, work: list[tuple[Request, int]]) -> None:
        for request, count in work:
            request.computed += count
            if request.computed == request.prompt:
                self.prefilling.remove(request)
                assert request.begun_at is not None
                timing = AttemptTiming(request.begun_at - request.sent_at, self.now - request.begun_at)
                request.facts.prefill_done(timing, 0)
                self._at(HOP_S, lambda one=request: self._first_token(one))  # type: ignore[misc]
                self._at(HOP_S, lambda one=request: self._join(one))  # type: ignore[misc]
        self._prefill_step()

    def _first_token(self, request: Request) -> None:
        request.facts.tokens(self.now, 1)
        self._move(request, Claim(None, 0, "d0", request.prompt))

    def _join(self, request: Request) -> None:
        request.tokens = 1
        self.joining.append(request)
        if not self._busy["d0"]:
            self._decode_step()

    def _decode_step(self) -> None:
        self.decoding += self.joining
        self.joining.clear()
        self._busy["d0"] = bool(self.decoding)
        if self.decoding:
            context = sum(r.prompt + r.tokens for r in self.decoding)
            self._at(self.cost.decode_s(len(self.decoding), context), self._decode_stepped)

    def _decode_stepped(self) -> None:
        for request in list(self.decoding):
            request.tokens += 1
            request.facts.tokens(self.now, 1)
            if request.tokens == request.answer:
                self.decoding.remove(request)
                self._end(request)
        self._decode_step()

    def _end(self, request: Request) -> None:
        assert request.chosen is not None
        request.facts.finished_at = self.now
        self._move(request, NO_CLAIM)
        self.lengths.ended("", request.answer)
        self.calibration.observe(request.chosen, 0.0, request.facts)
        self.done.append(request)

    def _move(self, request: Request, claim: Claim) -> None:
        self.claims.swap(request.claim, claim, self.now)
        self.situation.moved(request.claim, claim)
        request.claim = claim
