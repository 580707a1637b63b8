"""Real workers in this process, and a small router to drive them command by command."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
from tiny_llama import tiny_llama

import worker.shell as shell_module
from cluster.serving_worker import run
from core.config import load
from core.hostspec import HostSpec
from core.inventory import Inventory
from core.request import AttemptKey, WorkerRole, WorkItem
from core.wire import each_event, item_to_pb, key_to_pb
from tandem.sampling import SamplingParams
from tandem.v1 import common_pb2 as pb
from tandem.v1 import decode_pb2_grpc, prefill_pb2_grpc
from worker.node import Node
from worker.shell import WorkerInfo

EPOCH = 7
DEADLINE_S = 20.0
NOBODY = "127.0.0.1:1"  # a controller that is not there: workers must not care


async def until(check: Callable[[], object]) -> None:
    """Waits for something that announces itself to nobody."""
    async with asyncio.timeout(DEADLINE_S):
        while not check():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@dataclass
class RunningWorker:
    """One worker, seen from inside: its addresses, its block table, and the switch that stops it."""

    spec: HostSpec
    info: WorkerInfo
    node: Node
    stop: asyncio.Event
    task: asyncio.Task[None]

    @property
    def inventory(self) -> Inventory:
        return self.node.inventory

    async def settled(self) -> None:
        """Waits until nothing is held here, and checks the whole table."""
        await until(lambda: not self.inventory.counts().active and not self.inventory.leases_open())
        self.inventory.check()

    async def metrics(self) -> dict[str, float]:
        """Samples by name and labels, as a scraper gets them."""
        host, port = self.info.metrics_address.rsplit(":", 1)
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        async with asyncio.timeout(DEADLINE_S):
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        await writer.wait_closed()
        assert b" 200 OK" in head.splitlines()[0]
        lines = [line for line in body.decode().splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


@asynccontextmanager
async def running(role: WorkerRole, name: str = "", controller: str = NOBODY, **overrides: Any) -> AsyncIterator[RunningWorker]:
    """`overrides` are configuration paths with `__` for the dot."""
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    small = {"model.path": tiny_llama(), "engine.max_step_tokens": 32, "engine.kv_bytes": 2**20, "cluster.grace_s": 4.0}
    config = load(overrides={**small, **dotted})
    spec = HostSpec(name or f"{role.value}-0", role, EPOCH, config, controller=controller)
    stop = asyncio.Event()
    ready: asyncio.Future[WorkerInfo] = asyncio.get_running_loop().create_future()
    nodes: list[Any] = []
    build = shell_module.build_node

    def keeping(*args: Any) -> Any:
        nodes.append(build(*args))
        return nodes[-1]

    shell_module.build_node = keeping
    try:
        task = asyncio.create_task(run(spec, stop, ready.set_result), name=spec.worker_id)
        await asyncio.wait((task, ready), return_when=asyncio.FIRST_COMPLETED, timeout=DEADLINE_S)
    finally:
        shell_module.build_node = build
    if task.done():
        task.result()
    worker = RunningWorker(spec, ready.result(), nodes[0], stop, task)
    try:
        yield worker
    finally:
        stop.set()
        async with asyncio.timeout(DEADLINE_S):
            await task


@dataclass
class Link:
    """A router's session with one worker. Events are sorted by attempt; tokens of a step are taken apart."""

    peer_id: str = "router-1"
    peer_epoch: int = 1
    lease_s: float = 30.0
    events: dict[AttemptKey, asyncio.Queue[Any]] = field(default_factory=lambda: defaultdict(asyncio.Queue))
    steps: int = 0
    _writing: asyncio.Lock = field(default_factory=asyncio.Lock)  # a call takes one write at a time

    async def open(self, role: WorkerRole, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address)
        stub = prefill_pb2_grpc.PrefillStub if role is WorkerRole.PREFILL else decode_pb2_grpc.DecodeStub
        self._call = stub(self._channel).Session()
        hello = pb.SessionHello(peer_id=self.peer_id, epoch=self.peer_epoch, expected_epoch=EPOCH, lease_s=self.lease_s)
        await self._call.write(pb.SessionCommand(hello=hello))
        async with asyncio.timeout(DEADLINE_S):
            assert (await self._call.read()).WhichOneof("event") == "hello"
        self._reading = asyncio.create_task(self._read(), name=f"read {address}")

    async def close(self) -> None:
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)
        self._call.cancel()
        await self._channel.close()

    async def send(self, **command: Any) -> None:
        async with self._writing:
            await self._call.write(pb.SessionCommand(**command))

    async def event(self, key: AttemptKey) -> Any:
        """The next event of an attempt: a GeneratedToken or the message inside a SessionEvent."""
        async with asyncio.timeout(DEADLINE_S):
            return await self.events[key].get()

    async def expect(self, key: AttemptKey, kind: type) -> Any:
        event = await self.event(key)
        assert isinstance(event, kind), f"expected {kind.__name__}, got {type(event).__name__}: {event}"
        return event

    async def tokens(self, key: AttemptKey, count: int | None = None) -> list[pb.GeneratedToken]:
        """Tokens up to the last, or `count` of them; timing messages between them are skipped."""
        tokens: list[pb.GeneratedToken] = []
        while count is None or len(tokens) < count:
            event = await self.event(key)
            assert not isinstance(event, pb.AttemptFailed), event
            if isinstance(event, pb.GeneratedToken):
                tokens.append(event)
                if event.finish_reason:
                    break
        return tokens

    def ended(self) -> bool:
        """Whether the worker's side of the session is gone."""
        return self._reading.done()

    async def _read(self) -> None:
        while (message := await self._call.read()) is not grpc.aio.EOF:
            for event in each_event(message):
                self._sort(event)

    def _sort(self, event: pb.SessionEvent) -> None:
        kind = event.WhichOneof("event")
        if kind == "tokens":
            self.steps += 1
            for token in event.tokens.tokens:
                self.events[_key(token.key)].put_nowait(token)
        else:
            body = getattr(event, kind)
            self.events[_key(body.key)].put_nowait(body)


def _key(message: pb.AttemptKey) -> AttemptKey:
    return AttemptKey(message.request_id, message.attempt)


@dataclass
class TestRouter:
    """Places requests on a prefill and a decode worker, the way the journey does."""

    __test__ = False
    prefill: Link
    decode: Link

    async def reserve(self, item: WorkItem) -> pb.Reserved:
        await self.decode.send(reserve=pb.Reserve(item=item_to_pb(item)))
        return await self.decode.expect(item.key, pb.Reserved)

    async def start(self, item: WorkItem) -> pb.Opened:
        await self.prefill.send(start_prefill=pb.StartPrefill(item=item_to_pb(item)))
        return await self.prefill.expect(item.key, pb.Opened)

    async def hand_off(self, item: WorkItem, opened: pb.Opened) -> None:
        await self.decode.send(open_handoff=pb.OpenHandoff(key=key_to_pb(item.key), ticket=opened.ticket))

    async def split(self, item: WorkItem) -> list[int]:
        """The whole way of a request; its tokens, positions checked."""
        reserved = await self.reserve(item)
        assert reserved.granted, reserved.reason
        await self.hand_off(item, await self.start(item))
        tokens = await self.prefill.tokens(item.key, 1)
        if not tokens[-1].finish_reason:
            tokens += await self.decode.tokens(item.key)
        assert [token.position for token in tokens] == list(range(item.position, item.position + len(tokens)))
        return [token.token_id for token in tokens]

    async def local(self, item: WorkItem) -> list[int]:
        await self.decode.send(generate_local=pb.GenerateLocal(item=item_to_pb(item)))
        tokens = await self.decode.tokens(item.key)
        assert [token.position for token in tokens] == list(range(item.position, item.position + len(tokens)))
        return [token.token_id for token in tokens]

    async def cancel(self, key: AttemptKey) -> None:
        for link in (self.prefill, self.decode):
            await link.send(cancel=pb.CancelAttempt(key=key_to_pb(key)))


@asynccontextmanager
async def connected(*workers: RunningWorker, **link: Any) -> AsyncIterator[TestRouter]:
    """A router with a session to each worker; a single one takes the place of both."""
    async with AsyncExitStack() as stack:
        links = {}
        for one in workers:
            session = Link(**link)
            await session.open(one.spec.role, one.info.grpc_address)
            stack.push_async_callback(session.close)
            links[one.spec.role is WorkerRole.PREFILL] = session
        fallback = next(iter(links.values()))
        yield TestRouter(links.get(True, fallback), links.get(False, fallback))


def item(request: str, length: int, *, attempt: int = 1, max_tokens: int = 12, **sampling: Any) -> WorkItem:
    """A prompt of `length` tokens that differs with the request's name from its first token on."""
    base = sum(request.encode()) % 97
    prompt = tuple(2 + (base * 31 + 7 * i * i + 3 * i) % 500 for i in range(length))
    params = SamplingParams(**{"max_tokens": max_tokens, "seed": 11, "ignore_eos": True, "temperature": 0.0, **sampling})
    return WorkItem(AttemptKey(request, attempt), prompt, length, params)


def again(old: WorkItem, attempt: int, *tokens: int) -> WorkItem:
    """The same request placed once more, with the tokens delivered so far."""
    return replace(old, key=AttemptKey(old.key.request_id, attempt), token_ids=(*old.token_ids, *tokens))
