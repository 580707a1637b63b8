"""The one door behind both fronts: `generate` turns a request into a stream of parts. See `frontend_types.FrontDoor`."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator, Callable

from core.clock import Clock
from core.errors import InvalidRequestError, OverloadedError, TandemError, UnavailableError
from core.request import WorkerRole
from router.admission import Text, UsedIds, check_request_id, check_sampling, journey_spec, prompt_ids, resolve
from router.choice import ChoiceText
from router.decisions import Explanation
from router.dispatch import Dispatcher
from router.frontend_types import FrontRequest, ModelCard, Part
from router.metrics import RouterStats
from router.modelcard import ModelKnowledge
from router.run import Run, RunSpec
from router.slo import TermsOf
from router.turns import Turns


class Frontend:
    """Used from the asyncio thread. `text` is the model's tokenizer."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        text: Text,
        knowledge: ModelKnowledge,
        stats: RouterStats,
        clock: Clock,
        slow_client_s: float,
        terms_of: TermsOf,
        new_id: Callable[[], str] = lambda: uuid.uuid4().hex,
        on_end: Callable[[FrontRequest, str, float], None] = lambda request, request_id, took_s: None,
    ) -> None:
        """`new_id` names requests that came without an id. `on_end` hears of each that is over, and how long it took."""
        self.text = text
        self._dispatcher = dispatcher
        self._knowledge = knowledge
        self._stats = stats
        self._clock = clock
        self._slow_client_s = slow_client_s
        self._terms_of = terms_of
        self._new_id = new_id
        self._on_end = on_end
        self._runs: dict[str, Run | None] = {}  # None: being admitted
        self._cancelled_early: set[str] = set()  # while they were being admitted
        self._used = UsedIds()
        self._turns = Turns()
        self._closing = False
        self._idle = asyncio.Event()
        self._idle.set()

    async def generate(self, request: FrontRequest) -> AsyncGenerator[Part, None]:
        """See FrontDoor.generate."""
        request_id = self._take_id(request)
        arrived_at = self._clock.now()
        run: Run | None = None
        try:
            self._stats.running += 1
            run = await self._begin(request, request_id)
            while parts := await run.next_parts():
                for part in parts:
                    yield part
        except OverloadedError as error:
            self._explain_refusal(request, request_id, error, arrived_at, placed=run is not None)
            raise
        finally:
            self._stats.running -= 1
            del self._runs[request_id]
            self._cancelled_early.discard(request_id)
            if not self._runs:
                self._idle.set()
            if run is not None:
                run.close()
                if request.request_id:
                    self._used.ended(request_id, run.attempts_used)
            self._on_end(request, request_id, self._clock.now() - arrived_at)

    def cancel(self, request_id: str) -> bool:
        if request_id not in self._runs:
            return False
        run = self._runs[request_id]
        if run is None:
            self._cancelled_early.add(request_id)
        else:
            run.cancel()
        return True

    def explain(self, request_id: str) -> Explanation:
        """See FrontDoor.explain."""
        return self._dispatcher.placer.decisions.explain(request_id)

    def model(self) -> ModelCard:
        return self._knowledge.card(self._dispatcher.view)

    def ready(self) -> bool:
        """A (prefill, decode) pair or a colocated worker is connected, and the router is not stopping."""
        situation = self._dispatcher.situation()
        nobody: frozenset[str] = frozenset()
        pair = all(situation.candidates(role, nobody) for role in (WorkerRole.PREFILL, WorkerRole.DECODE))
        return not self._closing and (pair or bool(situation.candidates(WorkerRole.COLOCATED, nobody)))

    def begin_close(self) -> None:
        """No new requests; those under way go on."""
        self._closing = True

    async def drained(self) -> None:
        """Returns when no request is under way; the caller sets the deadline."""
        await self._idle.wait()

    @property
    def live(self) -> int:
        return len(self._runs)

    def _take_id(self, request: FrontRequest) -> str:
        """Claims the request's id at once, so that two calls in the same instant cannot share one."""
        if self._closing:
            raise UnavailableError("the router is stopping; send the request to another one", retry_after_s=1.0)
        request_id = request.request_id or self._new_id()
        check_request_id(request_id)
        if request_id in self._runs:
            raise InvalidRequestError(f"request_id {request_id!r} is already running; choose another or leave it empty")
        self._runs[request_id] = None
        self._idle.clear()
        return request_id

    async def _begin(self, request: FrontRequest, request_id: str) -> Run:
        try:
            run = await self._admit(request, request_id)
            run.begin()
        except TandemError as error:
            self._count_refusal(request, error)
            raise
        self._runs[request_id] = run
        if request_id in self._cancelled_early:
            run.cancel()
        return run

    def _count_refusal(self, request: FrontRequest, error: TandemError) -> None:
        self._stats.failed(error)
        with contextlib.suppress(InvalidRequestError):  # of a class there is not, nobody keeps count
            self._stats.attainment.failed(self._terms_of(request).slo_class, error)

    def _explain_refusal(
        self, request: FrontRequest, request_id: str, error: OverloadedError, arrived_at: float, *, placed: bool
    ) -> None:
        """A refusal is a decision too, though it names no place."""
        terms = self._terms_of(request)
        tokens = len(request.prompt) if isinstance(request.prompt, tuple) else 0
        about = Explanation(request_id, "admission", terms.slo_class, terms.slo, tokens, 0)
        self._dispatcher.placer.decisions.refused(about, self._clock.now() - arrived_at, error, placed=placed)

    async def _admit(self, request: FrontRequest, request_id: str) -> Run:
        arrived_at = self._clock.now()
        card = self.model()
        check_sampling(request.sampling, card)
        terms = self._terms_of(request)
        self._stats.came()
        self._dispatcher.check_room(terms)
        ids = await prompt_ids(request, self.text, card)
        sampling = resolve(request.sampling, len(ids), card, request_id)
        spec = journey_spec(request_id, ids, sampling, self.text, self._used.first_attempt(request_id), terms)
        stop_ids = frozenset(sampling.stop_token_ids) | frozenset(() if sampling.ignore_eos else self.text.eos_token_ids)

        def text_of(choice: int) -> ChoiceText:
            return ChoiceText(choice, self.text.stream(), sampling.stop, stop_ids)

        shown = "" if not request.echo else request.prompt if isinstance(request.prompt, str) else self.text.decode(ids)
        run_spec = RunSpec(request_id, spec, shown, self._slow_client_s, arrived_at)
        return Run(run_spec, self._dispatcher, self._stats, self._clock, text_of, self._turns)
