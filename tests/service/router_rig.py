"""A router's inside, wired as `router.main` wires it, with scripted workers around it instead of a cluster."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable
from typing import Any

from scripted_worker import Exchange, ScriptedWorker

from core.clock import SystemClock
from core.config import DEMO_MODEL, RouterConfig
from core.request import FinishReason, WorkerRole
from core.text import Tokenizer
from router.attempt import Limits
from router.dispatch import Dispatcher
from router.frontend import Frontend
from router.frontend_types import ChoiceFinished, Finished, FrontRequest, Part, Started, Token, TokenBatch
from router.links import Links
from router.metrics import RouterStats
from router.modelcard import ModelKnowledge
from router.placing import Placer
from router.policies import make_policy
from router.slo import TermsOf
from router.waiting_room import WaitingRoom
from router.watch import view_from_pb
from tandem.sampling import SamplingParams
from tandem.v1 import cluster_pb2

LIMITS = Limits(queue_timeout_s=10.0, request_timeout_s=30.0, answer_timeout_s=2.0, opened_timeout_s=5.0)
PROMPT = tuple(range(40, 60))
_tokenizer: list[Tokenizer] = []


def tokenizer() -> Tokenizer:
    if not _tokenizer:
        _tokenizer.append(Tokenizer.load(DEMO_MODEL))
    return _tokenizer[0]


def request(max_tokens: int | None = 16, seed: int = 7, request_id: str = "", **sampling: object) -> FrontRequest:
    """PROMPT with a seed; the scripted workers never end it early."""
    params = SamplingParams(max_tokens=max_tokens, seed=seed, ignore_eos=True, **sampling)  # type: ignore[arg-type]
    return FrontRequest(PROMPT, params, request_id=request_id)


class Collected:
    """The parts of one stream, put together as a client would."""

    def __init__(self, parts: list[Part]) -> None:
        self.parts = parts
        self.started = next((p for p in parts if isinstance(p, Started)), None)
        self.tokens: list[Token] = [t for p in parts if isinstance(p, TokenBatch) for t in p.tokens]
        self.ends = {p.choice: p for p in parts if isinstance(p, ChoiceFinished)}
        self.finished = next((p for p in parts if isinstance(p, Finished)), None)

    def ids(self, choice: int = 0) -> list[int]:
        """Token ids of a choice; their positions must be 0, 1, 2 …"""
        mine = [t for t in self.tokens if t.choice == choice]
        assert [t.position for t in mine] == list(range(len(mine)))
        return [t.token_id for t in mine]

    def text(self, choice: int = 0) -> str:
        return "".join(t.text for t in self.tokens if t.choice == choice) + self.ends[choice].tail_text

    def reason(self, choice: int = 0) -> FinishReason:
        return self.ends[choice].finish_reason


class Rig:
    def __init__(self, max_queue: int, limits: Limits, slow_client_s: float, config: RouterConfig) -> None:
        clock = SystemClock()
        self.stats = RouterStats()
        placer = Placer(make_policy(config.policy), 10.0, random.Random(0))
        self.dispatcher = Dispatcher(placer, limits, WaitingRoom(config, max_queue), clock)
        self.links = Links("router-0", 1, 5.0, self.dispatcher)
        self.dispatcher.links = self.links
        self.front = Frontend(
            self.dispatcher, tokenizer(), ModelKnowledge("", "test"), self.stats, clock, slow_client_s, TermsOf(config)
        )
        self.exchange = Exchange()
        self.workers: dict[str, ScriptedWorker] = {}
        self.killing: list[asyncio.Task[None]] = []
        self._changed = asyncio.Event()
        self.dispatcher.on_change = self._changed.set

    async def add(self, worker_id: str, role: WorkerRole, **options: Any) -> ScriptedWorker:
        worker = ScriptedWorker(worker_id, role, self.exchange, **options)
        await worker.start()
        self.workers[worker_id] = worker
        self.announce()
        await self.connected(worker_id)
        return worker

    def announce(self) -> None:
        """What the controller would send."""
        reports = [worker.report() for worker in self.workers.values()]
        snapshot = cluster_pb2.ClusterSnapshot(version=1, workers=reports, ages_s=[0.0] * len(reports))
        self.dispatcher.follow(view_from_pb(snapshot))

    async def connected(self, *worker_ids: str) -> None:
        async with asyncio.timeout(10):
            while not set(worker_ids) <= self.links.connected():
                self._changed.clear()
                await self._changed.wait()

    async def until(self, condition: Callable[[], bool]) -> None:
        """For what nothing announces; looks whenever the loop has turned."""
        async with asyncio.timeout(10):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.001)

    async def generate(self, request: FrontRequest) -> Collected:
        return Collected([part async for part in self.front.generate(request)])

    async def all_free(self) -> None:
        """Every living worker holds nothing, and the router remembers nothing."""
        for worker in self.workers.values():
            if not worker.dead:
                await worker.until(lambda worker=worker: not worker.held)  # type: ignore[misc]
        assert len(self.dispatcher) == 0
        assert self.dispatcher.placer.claims.is_empty()
        assert len(self.dispatcher.queue) == 0
        assert self.front.live == 0


@contextlib.asynccontextmanager
async def rig(
    prefill: int = 1,
    decode: int = 1,
    colocated: int = 0,
    *,
    max_queue: int = 100,
    limits: Limits = LIMITS,
    slow_client_s: float = 30.0,
    config: RouterConfig | None = None,
    **options: Any,
) -> AsyncIterator[Rig]:
    """`config`: what of the router's is not named beside it; without one, places do not depend on how quick this machine is."""
    made = Rig(max_queue, limits, slow_client_s, config or RouterConfig(policy="least_load"))
    try:
        for role, count in ((WorkerRole.PREFILL, prefill), (WorkerRole.DECODE, decode), (WorkerRole.COLOCATED, colocated)):
            for index in range(count):
                await made.add(f"{role.value}-{index}", role, **options)
        yield made
    finally:
        made.dispatcher.close()
        await made.links.close()
        await asyncio.gather(*made.killing)
        for worker in made.workers.values():
            if not worker.dead:
                await worker.die()
