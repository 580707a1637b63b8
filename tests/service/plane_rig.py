"""Workers and a store in this process that share a directory, and conversations whose turns land on different workers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from worker_harness import DEADLINE_S, EPOCH, RunningWorker, connected, item, running

from cluster.directory_service import DirectoryServicer
from core.blocks import block_keys
from core.clock import SystemClock
from core.config import load
from core.hostspec import HostSpec
from core.request import WorkerRole, WorkItem
from core.service import Registration, serve
from core.wire import item_to_pb
from kvtransfer.local_directory import ClockedDirectory, LocalDirectory
from kvtransfer.main import run as run_store
from tandem.v1 import common_pb2 as pb
from tandem.v1 import directory_pb2_grpc

PREFILL, DECODE, COLOCATED = WorkerRole.PREFILL, WorkerRole.DECODE, WorkerRole.COLOCATED
SIZE = 16
REPLY = 40  # tokens of an answer


class GatedDirectory(DirectoryServicer):
    """The real one; a test can hold its answers to lookups back."""

    def __init__(self, table: LocalDirectory) -> None:
        super().__init__(table, SystemClock())
        self.joined = self.located = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def Join(self, request, context):
        self.joined += 1
        return await super().Join(request, context)

    async def Locate(self, request, context):
        self.located += 1
        await self.gate.wait()
        return await super().Locate(request, context)


@dataclass
class Plane:
    """A directory, and the nodes that report to it."""

    directory: GatedDirectory
    table: ClockedDirectory
    address: str

    @asynccontextmanager
    async def worker(self, role: WorkerRole, name: str, **overrides) -> AsyncIterator[RunningWorker]:
        """Fetches whatever there is, however quick computing is: then what happens does not hang on the machine."""
        settings = {
            "store__fetch_always": True,
            "store__fetch_timeout_s": 10.0,
            "store__directory_timeout_s": 5.0,
            "store__directory_ttl_s": 2.0,
        }
        async with running(role, name, self.address, **{**settings, **overrides}) as one:
            yield one

    @asynccontextmanager
    async def store(self, **overrides) -> AsyncIterator[None]:
        dotted = {key.replace("__", "."): value for key, value in overrides.items()}
        config = load(overrides={"store.dram_bytes": 2**21, "store.directory_ttl_s": 2.0, "cluster.grace_s": 2.0, **dotted})
        stop, ready = asyncio.Event(), asyncio.get_running_loop().create_future()
        spec = HostSpec("store-0", WorkerRole.STORE, EPOCH, config, controller=self.address)
        task = asyncio.create_task(run_store(spec, stop, ready.set_result))
        await asyncio.wait((task, ready), return_when=asyncio.FIRST_COMPLETED, timeout=DEADLINE_S)
        ready.result()
        try:
            yield
        finally:
            stop.set()
            async with asyncio.timeout(DEADLINE_S):
                await task

    async def knows(self, keys: Sequence[bytes], *holders: str) -> None:
        """Waits until each of `keys` is said to be at one of `holders`."""

        async def found() -> bool:
            located = await self.table.locate(keys)
            named = [{holder.worker_id for holder in held} for held in located.holders]
            return len(named) == len(keys) and all(names & set(holders) for names in named)

        async with asyncio.timeout(DEADLINE_S):
            while not await found():  # noqa: ASYNC110
                await asyncio.sleep(0.02)


@asynccontextmanager
async def plane() -> AsyncIterator[Plane]:
    table = LocalDirectory()
    servicer = GatedDirectory(table)
    registration = Registration("tandem.v1.Directory", directory_pb2_grpc.add_DirectoryServicer_to_server, servicer)
    async with serve("127.0.0.1:0", registration, grace_s=0.0) as server:
        yield Plane(servicer, ClockedDirectory(table, SystemClock()), server.address)


async def met(worker: RunningWorker, peers: int) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while (await worker.metrics())["tandem_kv_peers"] != peers:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


def follow_up(name: str, before: WorkItem, answer: Sequence[int], length: int = 50) -> WorkItem:
    """The next turn of a conversation: all that was said, and something new."""
    new = item(name, length, max_tokens=REPLY)
    tokens = (*before.token_ids, *answer, *new.token_ids)
    return replace(new, token_ids=tokens, prompt_len=len(tokens))


def finished_keys(worker: RunningWorker, turn: WorkItem, answer: Sequence[int]) -> list[bytes]:
    """Of the full blocks that a turn leaves behind: the last token of an answer has no KV yet."""
    return block_keys(worker.node.root_key(b""), (*turn.token_ids, *answer)[:-1], SIZE)


async def split(prefill: RunningWorker, decode: RunningWorker, turn: WorkItem) -> tuple[list[int], int]:
    """A request's tokens, and how many of its prompt's tokens had KV already."""
    async with connected(prefill, decode) as router:
        tokens = await router.split(turn)
        return tokens, (await router.prefill.expect(turn.key, pb.PrefillDone)).cached_tokens


async def local(worker: RunningWorker, turn: WorkItem) -> tuple[list[int], int]:
    async with connected(worker) as router:
        await router.decode.send(generate_local=pb.GenerateLocal(item=item_to_pb(turn)))
        events = [await router.decode.event(turn.key) for _ in range(REPLY + 1)]
        done = next(event for event in events if isinstance(event, pb.PrefillDone))
        return [event.token_id for event in events if isinstance(event, pb.GeneratedToken)], done.cached_tokens


async def converse() -> tuple[list[WorkItem], list[list[int]]]:
    """Three turns and their answers, by one worker alone that fetches nothing."""
    async with running(COLOCATED, engine__prefix_cache=False) as worker:
        turns = [item("turn-1", 100, max_tokens=REPLY)]
        answers = [(await local(worker, turns[0]))[0]]
        for number in (2, 3):
            turns.append(follow_up(f"turn-{number}", turns[-1], answers[-1]))
            answers.append((await local(worker, turns[-1]))[0])
        return turns, answers
