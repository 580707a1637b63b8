"""Workers that speak the real Session protocol over real gRPC and compute nothing: the next token is a hash of the history.

So a continuation anywhere gives the tokens of the undisturbed run, or a test sees that it did not. A script can hold a
worker at a stage, make it refuse, fail or die there, and look at what it still holds.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import grpc

from core.blocks import KvLayout, KvSource, KvTicket
from core.cost_model import Fit
from core.request import AttemptKey, AttemptTiming, FinishReason, TokenEvent, WorkerRole, WorkItem
from core.service import Registration, serve
from core.wire import (
    each_command,
    fit_to_pb,
    item_from_pb,
    key_from_pb,
    key_to_pb,
    layout_to_pb,
    role_to_pb,
    ticket_to_pb,
    timing_to_pb,
    token_to_pb,
)
from tandem.v1 import cluster_pb2
from tandem.v1 import common_pb2 as pb
from tandem.v1.decode_pb2_grpc import add_DecodeServicer_to_server
from tandem.v1.prefill_pb2_grpc import add_PrefillServicer_to_server

LAYOUT = KvLayout(b"fingerprint-0000", "float32", 1, 1, 8, 16)
VOCAB = 256
MAX_MODEL_LEN = 4096
BLOCKS = 4096


def next_token(item: WorkItem, generated: list[int]) -> int:
    """Depends on prompt, tokens so far, seed, choice: what the real sampler depends on. Never an end-of-sequence."""
    history = (*item.token_ids[: item.prompt_len], *generated)
    text = f"{history}{item.sampling.seed}{item.choice}".encode()
    return 32 + int.from_bytes(blake2b(text, digest_size=4).digest()) % 90


def expected(prompt: tuple[int, ...], seed: int, count: int, choice: int = 0) -> list[int]:
    """The undisturbed run."""
    from tandem.sampling import SamplingParams

    item = WorkItem(AttemptKey("x", 1), prompt, len(prompt), SamplingParams(max_tokens=count, seed=seed), choice)
    tokens: list[int] = []
    for _ in range(count):
        tokens.append(next_token(item, tokens))
    return tokens


@dataclass
class Exchange:
    """Stands for the KV plane: what prefill workers closed, for decode workers to find."""

    closed: dict[AttemptKey, asyncio.Future[list[int]]] = field(default_factory=dict)
    exporters: dict[AttemptKey, ScriptedWorker] = field(default_factory=dict)

    def of(self, key: AttemptKey) -> asyncio.Future[list[int]]:
        if key not in self.closed:
            self.closed[key] = asyncio.get_running_loop().create_future()
        return self.closed[key]

    async def follow_done(self, key: AttemptKey) -> None:
        """Decode holds everything: prefill's export is over."""
        if key in self.exporters:
            await self.exporters.pop(key)._drop(key)


Stage = str  # "reserve", "start", "opened", "first", "done", "joined", "token", "local"
Hook = Callable[[Stage, AttemptKey], Any]


class ScriptedWorker:
    """`hook(stage, key)` is awaited (when it returns an awaitable) as the worker reaches a stage, before it says so."""

    def __init__(
        self, worker_id: str, role: WorkerRole, exchange: Exchange, *, epoch: int = 1, step_s: float = 0.0, room: int = 10**6
    ) -> None:
        self.worker_id, self.role, self.epoch, self.step_s, self.room = worker_id, role, epoch, step_s, room
        self.exchange = exchange
        self.hook: Hook = lambda stage, key: None
        self.refuse: Callable[[WorkItem], str] = lambda item: ""
        self.held: dict[AttemptKey, WorkItem] = {}
        self.seen: list[tuple[str, AttemptKey]] = []
        self.step_cost: Fit | None = None  # what it says its steps cost
        self.dead = False
        self.address = ""
        self.changed = asyncio.Condition()
        self._tasks: dict[AttemptKey, asyncio.Task[None]] = {}
        self._cancelled: set[AttemptKey] = set()
        self._out: asyncio.Queue[pb.SessionEvent] = asyncio.Queue()
        self._stack = contextlib.AsyncExitStack()

    # ---- life

    async def start(self, listen: str = "127.0.0.1:0") -> None:
        add = add_PrefillServicer_to_server if self.role is WorkerRole.PREFILL else add_DecodeServicer_to_server
        name = "tandem.v1.Prefill" if self.role is WorkerRole.PREFILL else "tandem.v1.Decode"
        server = await self._stack.enter_async_context(serve(listen, Registration(name, add, self), grace_s=0))
        self.address = server.address

    async def die(self) -> None:
        """As a killed process: every session breaks, everything held is gone, nobody is told."""
        self.dead = True
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        self._tasks.clear()
        await self._stack.aclose()
        async with self.changed:
            self.held.clear()
            self.changed.notify_all()

    def report(self) -> cluster_pb2.WorkerReport:
        state = cluster_pb2.WORKER_STATE_DEAD if self.dead else cluster_pb2.WORKER_STATE_READY
        return cluster_pb2.WorkerReport(
            worker_id=self.worker_id,
            role=role_to_pb(self.role),
            epoch=self.epoch,
            state=state,
            grpc_address=self.address,
            blocks=cluster_pb2.BlockCounts(total=BLOCKS, free=BLOCKS),
            layout=layout_to_pb(LAYOUT),
            step_cost=fit_to_pb(self.step_cost) if self.step_cost is not None else None,
            model=cluster_pb2.ModelInfo(name="scripted", max_model_len=MAX_MODEL_LEN, vocab_size=VOCAB, path="scripted"),
        )

    async def until(self, condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
        """Waits for something about what is held or seen."""
        async with asyncio.timeout(timeout_s), self.changed:
            await self.changed.wait_for(condition)

    # ---- the protocol

    async def Session(self, requests: AsyncIterator[pb.SessionCommand], context: Any) -> AsyncIterator[pb.SessionEvent]:
        hello = (await anext(requests)).hello
        if hello.expected_epoch != self.epoch:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "another epoch")
        self._out = asyncio.Queue()
        yield pb.SessionEvent(hello=pb.SessionHello(peer_id=self.worker_id, epoch=self.epoch))
        reader = asyncio.create_task(self._read(requests), name="scripted read")
        try:
            while True:
                yield await self._out.get()
        finally:
            reader.cancel()

    async def _read(self, requests: AsyncIterator[pb.SessionCommand]) -> None:
        async for message in requests:
            for command in each_command(message):
                await self._heed(command)

    async def _heed(self, command: pb.SessionCommand) -> None:
        kind = command.WhichOneof("command")
        if kind == "cancel":
            await self._cancel(key_from_pb(command.cancel.key))
        elif kind == "open_handoff":
            key = key_from_pb(command.open_handoff.key)
            if key in self.held:
                self._spawn(key, self._decode(self.held[key]))
        elif kind == "follow_kv":
            self._say(kv_changes=pb.KvChanges(stream=command.follow_kv.stream, sequence=1))  # it has no blocks
        elif kind is not None:
            await self._begin(kind, item_from_pb(getattr(command, kind).item))

    async def _begin(self, kind: str, item: WorkItem) -> None:
        key = item.key
        await self._note(kind, key)
        refusal = "cancelled before" if key in self._cancelled else self.refuse(item)
        if not refusal and len(self.held) >= self.room:
            refusal = "no room"
        if kind == "reserve":
            if not refusal:
                await self._hold(key, item)
            await self._reach("reserve", key)
            self._say(reserved=pb.Reserved(key=key_to_pb(key), granted=not refusal, reason=refusal))
        elif refusal:
            self.fail(key, "overloaded", refusal)
        else:
            await self._hold(key, item)
            self._spawn(key, self._prefill(item) if kind == "start_prefill" else self._local(item))

    async def _prefill(self, item: WorkItem) -> None:
        key = item.key
        self.exchange.exporters[key] = self
        await self._reach("start", key)
        source = KvSource(self.worker_id, self.epoch, self.address)
        self._say(opened=pb.Opened(key=key_to_pb(key), ticket=ticket_to_pb(KvTicket(key, LAYOUT, source, 10.0))))
        await self._reach("opened", key)
        generated = list(item.token_ids[item.prompt_len :])
        token = next_token(item, generated)
        last = len(generated) + 1 == item.sampling.max_tokens
        await self._reach("first", key)
        self._say_tokens(TokenEvent(key, len(generated), token, finish_reason=FinishReason.LENGTH if last else None))
        await self._reach("done", key)
        timing = AttemptTiming(queue_s=0.001, prefill_s=0.002)
        self._say(prefill_done=pb.PrefillDone(key=key_to_pb(key), timing=timing_to_pb(timing), cached_tokens=0))
        future = self.exchange.of(key)
        if not future.done():
            future.set_result([*generated, token])

    async def _decode(self, item: WorkItem) -> None:
        key = item.key
        generated = list(await self.exchange.of(key))
        await self.exchange.follow_done(key)
        await self._reach("joined", key)
        self._say(joined=pb.Joined(key=key_to_pb(key), timing=timing_to_pb(AttemptTiming(transfer_s=0.001))))
        await self._generate(item, generated)

    async def _local(self, item: WorkItem) -> None:
        await self._reach("local", item.key)
        await self._generate(item, list(item.token_ids[item.prompt_len :]))

    async def _generate(self, item: WorkItem, generated: list[int]) -> None:
        key, max_tokens = item.key, item.sampling.max_tokens
        assert max_tokens is not None
        while len(generated) < max_tokens:
            await asyncio.sleep(self.step_s)
            await self._reach("token", key)
            token = next_token(item, generated)
            generated.append(token)
            last = len(generated) == max_tokens
            event = TokenEvent(key, len(generated) - 1, token, -0.5, ((token, -0.5),), FinishReason.LENGTH if last else None)
            self._say_tokens(event)
        await self._drop(key)

    def fail(self, key: AttemptKey, code: str, message: str, *, retryable: bool = True) -> None:
        self._say(failed=pb.AttemptFailed(key=key_to_pb(key), code=code, message=message, retryable=retryable))

    async def give_back(self, key: AttemptKey, code: str = "out_of_blocks") -> None:
        """A victim of memory shortage."""
        self._tasks[key].cancel()
        await self._drop(key)
        self.fail(key, code, "given back")

    # ---- inside

    async def _cancel(self, key: AttemptKey) -> None:
        self._cancelled.add(key)
        task = self._tasks.pop(key, None)
        if task is not None:
            task.cancel()
        self.seen.append(("cancel", key))
        await self._drop(key)

    async def _hold(self, key: AttemptKey, item: WorkItem) -> None:
        async with self.changed:
            self.held[key] = item
            self.changed.notify_all()

    async def _drop(self, key: AttemptKey) -> None:
        async with self.changed:
            self.held.pop(key, None)
            self._tasks.pop(key, None)
            self.changed.notify_all()

    async def _note(self, kind: str, key: AttemptKey) -> None:
        async with self.changed:
            self.seen.append((kind, key))
            self.changed.notify_all()

    async def _reach(self, stage: Stage, key: AttemptKey) -> None:
        answer = self.hook(stage, key)
        if answer is not None:
            await answer

    def _spawn(self, key: AttemptKey, work: Any) -> None:
        task = asyncio.create_task(work, name=f"{self.worker_id} {key}")
        self._tasks[key] = task
        task.add_done_callback(self._surface)

    def _surface(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            task.result()

    def _say(self, **event: Any) -> None:
        self._out.put_nowait(pb.SessionEvent(**event))

    def _say_tokens(self, *tokens: TokenEvent) -> None:
        self._say(tokens=pb.StepTokens(tokens=[token_to_pb(token) for token in tokens]))
