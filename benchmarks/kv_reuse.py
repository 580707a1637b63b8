"""What it is worth to find KV that was computed elsewhere: time to the first token with and without.

Claims (issue "The KV plane"):
  - a second request sharing a 4,096-token prefix, on another prefill worker of the host: TTFT at most 0.35 x cold
  - looking for blocks that nobody has costs a prompt at most 1 ms

Worker processes as a cluster starts them, a directory as the controller serves it, driven without a router; TTFT is taken
from sending the prompt to receiving the first token.

    python -m benchmarks.kv_reuse [--quick] [--json FILE] [--only peer,store,miss]
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import shutil
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import grpc

from benchmarks.clusters import free_port
from benchmarks.rows import Row, arguments, report
from benchmarks.toy_models import make
from cluster.directory_service import DirectoryServicer
from cluster.launcher import Handle, LocalLauncher
from core.blocks import block_keys, root_key
from core.clock import SystemClock
from core.config import Config, load
from core.hostspec import HostSpec
from core.request import AttemptKey, WorkerRole, WorkItem
from core.service import Registration, serve
from core.wire import each_event, item_to_pb, key_to_pb
from kvtransfer.directory import NodeRecord
from kvtransfer.local_directory import ClockedDirectory, LocalDirectory
from tandem.sampling import SamplingParams
from tandem.v1 import common_pb2 as pb
from tandem.v1 import directory_pb2_grpc, prefill_pb2_grpc

PREFIX = 4096
TAIL = 16
SHORT = 512
MODEL = "m15"
CONTEXT = 8192
BLOCK = 16
VOCABULARY = 8000
READY_S = 120.0
ANSWER_S = 300.0  # a busy machine computes 4,096 tokens slowly
_EPOCHS = itertools.count(1)
_REQUESTS = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Answer:
    admitted_s: float
    first_token_s: float
    cached_tokens: int


class Prefill:
    """A session with one prefill worker process, asked one prompt at a time."""

    def __init__(self, spec: HostSpec, channel: grpc.aio.Channel) -> None:
        self.worker_id = spec.worker_id
        self._call = prefill_pb2_grpc.PrefillStub(channel).Session()  # type: ignore[no-untyped-call]
        self._epoch = spec.epoch
        self._told: deque[pb.SessionEvent] = deque()

    async def open(self) -> None:
        hello = pb.SessionHello(peer_id="bench", epoch=1, expected_epoch=self._epoch, lease_s=60.0)
        await self._call.write(pb.SessionCommand(hello=hello))
        await self._event("hello")

    async def ask(self, tokens: Sequence[int]) -> Answer:
        key = AttemptKey(f"bench-{next(_REQUESTS)}", 1)
        sampling = SamplingParams(max_tokens=4, seed=1, temperature=0.0, ignore_eos=True)
        item = WorkItem(key, tuple(tokens), len(tokens), sampling)
        command = pb.SessionCommand(start_prefill=pb.StartPrefill(item=item_to_pb(item)))
        started = time.perf_counter()
        await self._call.write(command)
        await self._event("opened")
        admitted = time.perf_counter()
        await self._event("tokens")
        first_token = time.perf_counter()
        done = await self._event("prefill_done")
        await self._call.write(pb.SessionCommand(cancel=pb.CancelAttempt(key=key_to_pb(key))))  # nobody decodes here
        return Answer(admitted - started, first_token - started, done.prefill_done.cached_tokens)

    async def _event(self, kind: str) -> pb.SessionEvent:
        if not self._told:
            async with asyncio.timeout(ANSWER_S):
                message = await self._call.read()
            if message is grpc.aio.EOF:
                raise RuntimeError(f"{self.worker_id} ended the session where {kind} was expected")
            self._told.extend(each_event(message))
        event = self._told.popleft()
        if event.WhichOneof("event") != kind:
            raise RuntimeError(f"{self.worker_id} answered {event} where {kind} was expected")
        return event


class Counting(DirectoryServicer):
    """The controller's directory; counts how often it is asked."""

    lookups = 0

    async def Locate(self, request: Any, context: Any) -> Any:
        self.lookups += 1
        return await super().Locate(request, context)


class Hosts:
    """A directory in this process, and workers and a store in processes of their own."""

    def __init__(self, model: Path, address: str, directory: Counting, table: ClockedDirectory, stack: AsyncExitStack) -> None:
        self.directory = directory
        self._model = model
        self._address = address
        self._table = table
        self._running: dict[str, Handle] = {}
        lines = stack.enter_context(model.with_name("log").open("w"))
        self._launcher = LocalLauncher(on_line=lambda line: print(line, file=lines, flush=True))
        stack.push_async_callback(self._launcher.close)

    def config(self, **store: object) -> Config:
        settings = {
            "model.path": str(self._model),
            "engine.kv_bytes": 512 * 2**20,
            "store.dram_bytes": 384 * 2**20,
            "store.directory_ttl_s": 3.0,
            **{f"store.{name}": value for name, value in store.items()},
        }
        return load(overrides=settings)

    @asynccontextmanager
    async def host(self, role: WorkerRole, name: str, config: Config) -> AsyncIterator[tuple[HostSpec, grpc.aio.Channel]]:
        spec = HostSpec(name, role, next(_EPOCHS), config, self._address, listen=f"127.0.0.1:{free_port()}")
        handle = self._running[name] = await self._launcher.launch(spec)
        try:
            async with grpc.aio.insecure_channel(spec.listen) as channel:
                ready = asyncio.ensure_future(channel.channel_ready())
                await asyncio.wait((ready, handle.exited), timeout=READY_S, return_when=asyncio.FIRST_COMPLETED)
                if not ready.done():
                    raise RuntimeError(
                        f"{name} did not start: {handle.exited.result() if handle.exited.done() else 'too slow'}"
                    )
                yield spec, channel
        finally:
            await self.stop(name)

    async def stop(self, name: str) -> None:
        """Of a host that runs, or that ran. Comes back when its process has ended."""
        handle = self._running.pop(name, None)
        if handle is not None:
            await handle.stop(10.0)

    @asynccontextmanager
    async def prefill(self, name: str, **store: object) -> AsyncIterator[Prefill]:
        async with self.host(WorkerRole.PREFILL, name, self.config(**store)) as (spec, channel):
            session = Prefill(spec, channel)
            await session.open()
            yield session

    async def node(self, name: str) -> NodeRecord:
        """Waits until a node has joined."""
        async with asyncio.timeout(READY_S):
            while True:
                found = [node for node in await self._table.nodes() if node.source.worker_id == name]
                if found:
                    return found[0]
                await asyncio.sleep(0.01)

    async def known(self, worker: str, tokens: Sequence[int]) -> None:
        """Waits until the blocks of a prefix are said to be at that node."""
        layout = (await self.node("prefill-0")).layout
        assert layout is not None
        keys = block_keys(root_key(layout.fingerprint), tokens, BLOCK)
        async with asyncio.timeout(READY_S):
            while True:
                located = await self._table.locate(keys)
                if sum(any(h.worker_id == worker for h in held) for held in located.holders) == len(keys):
                    return
                await asyncio.sleep(0.01)


def tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randint(300, VOCABULARY) for _ in range(count)]


@dataclass(frozen=True, slots=True)
class Workers:
    """Started once, together: importing torch takes a worker longer than most of what is measured here."""

    one: Prefill  # look for blocks of others and offer theirs to no store
    two: Prefill
    mortal: Prefill  # offers its blocks to the store, and dies
    silent: Prefill  # looks for nothing


@asynccontextmanager
async def started(hosts: Hosts) -> AsyncIterator[Workers]:
    """All four, warm, and all but the silent one known to the directory."""
    settings: tuple[dict[str, object], ...] = ({"offer": False}, {"offer": False}, {}, {"offer": False, "fetch": False})
    async with AsyncExitStack() as stack:
        async with asyncio.TaskGroup() as group:
            starting = [
                group.create_task(stack.enter_async_context(hosts.prefill(f"prefill-{n}", **store)))
                for n, store in enumerate(settings)
            ]
        rng, workers = random.Random(0), Workers(*(task.result() for task in starting))
        for session in (workers.one, workers.two, workers.mortal):
            await hosts.node(session.worker_id)
        lengths = {workers.one: PREFIX, workers.two: PREFIX, workers.mortal: SHORT, workers.silent: SHORT}
        await asyncio.gather(*(session.ask(tokens(rng, length)) for session, length in lengths.items()))
        await asyncio.sleep(2.0)  # each has heard of the others
        yield workers


async def other_worker(hosts: Hosts, workers: Workers, rounds: int) -> list[Row]:
    """The same prefix on two prefill workers, who take turns at being first."""
    rng, cold, warm = random.Random(1), [], []
    for number in range(rounds):
        first, second = (workers.one, workers.two) if number % 2 else (workers.two, workers.one)
        prefix = tokens(rng, PREFIX)
        cold.append(_cold(await first.ask(prefix + tokens(rng, TAIL))))
        await hosts.known(first.worker_id, prefix)
        warm.append(_reused(await second.ask(prefix + tokens(rng, TAIL))))
    how = f"{rounds} prefixes of {PREFIX} tokens, {MODEL}, fp32, one thread per worker, one request at a time"
    ratio = median(warm) / median(cold)
    return [
        Row("kv_reuse.ttft_ratio", "TTFT on another prefill worker / cold", ratio, "x", 0.35, "<=", "cold", how),
        Row("kv_reuse.cold_ms", "TTFT cold", median(cold) * 1e3, "ms", None, "<=", "", how),
        Row("kv_reuse.warm_ms", "TTFT with the prefix fetched from a peer", median(warm) * 1e3, "ms", None, "<=", "", how),
    ]


async def after_its_death(hosts: Hosts, workers: Workers, rounds: int) -> list[Row]:
    """The worker that computed the prefixes is gone; the store has them."""
    rng, cold, warm = random.Random(2), [], []
    prefixes = [tokens(rng, PREFIX) for _ in range(rounds)]
    async with hosts.host(WorkerRole.STORE, "store-0", hosts.config()):
        for prefix in prefixes:
            cold.append(_cold(await workers.mortal.ask(prefix + tokens(rng, TAIL))))
            await hosts.known("store-0", prefix)
        await hosts.stop(workers.mortal.worker_id)
        warm = [_reused(await workers.two.ask(prefix + tokens(rng, TAIL))) for prefix in prefixes]
    how = f"{rounds} prefixes of {PREFIX} tokens, the worker that computed them stopped, {MODEL}"
    ratio = median(warm) / median(cold)
    return [Row("kv_reuse.store_ttft_ratio", "TTFT from the store's memory / cold", ratio, "x", 0.35, "<=", "cold", how)]


async def nobody_has_it(hosts: Hosts, workers: Workers, rounds: int) -> list[Row]:
    """Prompts that are new to everybody, on a worker that looks for them and on one that does not, in turns."""
    rng, asking, silent = random.Random(3), [], []
    for _ in range(3):
        await workers.one.ask(tokens(rng, SHORT))
        await workers.silent.ask(tokens(rng, SHORT))
    before = hosts.directory.lookups
    for _ in range(rounds):
        asking.append((await workers.one.ask(tokens(rng, SHORT))).admitted_s)
        silent.append((await workers.silent.ask(tokens(rng, SHORT))).admitted_s)
    if hosts.directory.lookups - before != rounds:
        raise RuntimeError(f"{hosts.directory.lookups - before} of {rounds} prompts were looked for")
    how = f"{rounds} new prompts of {SHORT} tokens each, one at a time, until the engine has them"
    later_ms, peer = (median(asking) - median(silent)) * 1e3, "a worker that does not look"
    return [Row("kv_reuse.miss_ms", "looking for what nobody has", later_ms, "ms", 1.0, "<=", peer, how)]


def _cold(answer: Answer) -> float:
    if answer.cached_tokens:
        raise RuntimeError(f"a new prompt found {answer.cached_tokens} tokens cached")
    return answer.first_token_s


def _reused(answer: Answer) -> float:
    if answer.cached_tokens != PREFIX:
        raise RuntimeError(f"{answer.cached_tokens} of {PREFIX} tokens were found")
    return answer.first_token_s


def with_context(model: Path, folder: Path) -> Path:
    """The model with room for the prefix and more: weights of a rotary model do not depend on it."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": CONTEXT}))
    return folder


async def measure(quick: bool, parts: Sequence[str]) -> list[Row]:
    table = LocalDirectory()
    directory = Counting(table, SystemClock())
    registration = Registration("tandem.v1.Directory", directory_pb2_grpc.add_DirectoryServicer_to_server, directory)
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as folder:
        model, log = with_context(make(MODEL), Path(folder) / "model"), Path(folder) / "log"
        try:
            async with serve("127.0.0.1:0", registration) as server, AsyncExitStack() as stack:
                hosts = Hosts(model, server.address, directory, ClockedDirectory(table, SystemClock()), stack)
                rows: list[Row] = []
                workers = await stack.enter_async_context(started(hosts))
                if "peer" in parts:
                    rows += await other_worker(hosts, workers, 4 if quick else 20)
                if "miss" in parts:
                    rows += await nobody_has_it(hosts, workers, 25 if quick else 200)
                if "store" in parts:
                    rows += await after_its_death(hosts, workers, 3 if quick else 10)
                return rows
        except Exception:
            sys.stderr.write(log.read_text()[-4000:] if log.exists() else "")
            raise


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", default="peer,store,miss", help="which parts, separated by commas")
    options = parser.parse_args()
    report(asyncio.run(measure(options.quick, options.only.split(","))), options.json)


if __name__ == "__main__":
    main()
