"""KV computed anywhere is used everywhere: by the next turn on other workers, and after those that computed it are gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, replace

import pytest
from worker_harness import DEADLINE_S, EPOCH, RunningWorker, again, connected, item, running, until

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

pytestmark = pytest.mark.service
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


@pytest.fixture(scope="module")
def conversation() -> tuple[list[WorkItem], list[list[int]]]:
    """Three turns and their answers, by one worker alone that fetches nothing."""

    async def converse() -> tuple[list[WorkItem], list[list[int]]]:
        async with running(COLOCATED, engine__prefix_cache=False) as worker:
            turns = [item("turn-1", 100, max_tokens=REPLY)]
            answers = [(await local(worker, turns[0]))[0]]
            for number in (2, 3):
                turns.append(follow_up(f"turn-{number}", turns[-1], answers[-1]))
                answers.append((await local(worker, turns[-1]))[0])
            return turns, answers

    return asyncio.run(converse())


@pytest.mark.parametrize("transport", ["shm", "tcp", "grpc"])
@pytest.mark.parametrize("with_store", [False, True])
async def test_later_turns_on_other_workers_reuse_every_full_block(transport, with_store, conversation):
    """Turn 2 meets workers that have nothing; turn 3 the first ones, which lack what the others added."""
    turns, answers = conversation
    how = {"transfer__transport": transport}
    async with (
        plane() as p,
        p.store(**how) if with_store else nullcontext(),
        p.worker(PREFILL, "prefill-0", **how) as prefill0,
        p.worker(DECODE, "decode-0", **how) as decode0,
        p.worker(PREFILL, "prefill-1", **how) as prefill1,
        p.worker(DECODE, "decode-1", **how) as decode1,
    ):
        pairs = [(prefill0, decode0), (prefill1, decode1), (prefill0, decode0)]
        kept: list[bytes] = []
        for number, (prefill, decode) in enumerate(pairs):
            await met(prefill, 3 + (with_store and number > 0))
            tokens, cached = await split(prefill, decode, turns[number])
            assert tokens == answers[number], "the tokens are those of one worker that computes everything"
            assert cached == len(kept) * SIZE, "every full block of the earlier turns, generated tokens included"
            kept = finished_keys(prefill, turns[number], tokens)
            await p.knows(kept, *(["store-0"] if with_store else ["decode-0", "decode-1"]))
        found = {name: value for name, value in (await prefill1.metrics()).items() if "found_blocks" in name}
        second = len(finished_keys(prefill0, turns[0], answers[0]))
        assert sum(found.values()) == second, "of turn 2, all from elsewhere"
        for worker in (prefill0, decode0, prefill1, decode1):
            await worker.settled()


async def test_what_workers_computed_outlives_them_in_the_store(conversation):
    turns, answers = conversation
    async with plane() as p, p.store():
        async with p.worker(PREFILL, "prefill-0") as prefill, p.worker(DECODE, "decode-0") as decode:
            tokens, _ = await split(prefill, decode, turns[0])
            kept = finished_keys(prefill, turns[0], tokens)
            await p.knows(kept, "store-0")
        async with p.worker(PREFILL, "prefill-1") as prefill, p.worker(DECODE, "decode-1") as decode:
            await met(prefill, 2)
            tokens, cached = await split(prefill, decode, turns[1])
            assert tokens == answers[1]
            assert cached == len(kept) * SIZE
            metrics, kept_bytes = await prefill.metrics(), len(kept) * prefill.node.layout.block_bytes
            assert metrics['tandem_kv_found_blocks_total{source="store",tier="dram"}'] == len(kept)
            assert metrics['tandem_kv_fetched_bytes_total{source="store",tier="dram"}'] == kept_bytes
            # what came from the store is not offered to it again
            await p.knows(finished_keys(prefill, turns[1], tokens), "store-0")
            known = [(await one.metrics())['tandem_kv_offered_blocks_total{outcome="known"}'] for one in (prefill, decode)]
            assert known == [0, 0]


async def test_whole_requests_fetch_too(conversation):
    turns, answers = conversation
    async with (
        plane() as p,
        p.worker(COLOCATED, "colocated-0") as first,
        p.worker(COLOCATED, "colocated-1") as second,
    ):
        await met(first, 1)
        assert await local(first, turns[0]) == (answers[0], 0)
        kept = finished_keys(first, turns[0], answers[0])
        await p.knows(kept, "colocated-0")
        assert await local(second, turns[1]) == (answers[1], len(kept) * SIZE)
        await first.settled()
        await second.settled()


async def test_a_cancel_while_blocks_are_fetched_frees_everything(conversation):
    turns, answers = conversation
    async with plane() as p, p.worker(PREFILL, "prefill-0") as prefill, p.worker(DECODE, "decode-0") as decode:
        await met(prefill, 1)
        p.directory.gate.clear()
        async with connected(prefill, decode) as router:
            await router.reserve(turns[0])
            await router.prefill.send(start_prefill=pb.StartPrefill(item=item_to_pb(turns[0])))
            await until(lambda: p.directory.located)
            await router.cancel(turns[0].key)
            await prefill.settled()
            await decode.settled()
            p.directory.gate.set()
            assert await router.split(again(turns[0], 2)) == answers[0]
        await prefill.settled()


async def test_a_directory_that_does_not_answer_delays_a_prompt_no_longer_than_allowed(conversation):
    turns, answers = conversation
    quick = {"store__fetch_timeout_s": 0.2}
    async with plane() as p, p.worker(PREFILL, "prefill-0", **quick) as prefill, p.worker(DECODE, "decode-0") as decode:
        await met(prefill, 1)
        p.directory.gate.clear()
        assert await split(prefill, decode, turns[0]) == (answers[0], 0)
        assert (await prefill.metrics())["tandem_kv_fetch_timeouts_total"] == 1
        p.directory.gate.set()


async def test_a_prompt_ends_while_it_waits_for_blocks_when_its_deadline_does(conversation):
    """Half of what is left is spent on looking; the engine then has the rest."""
    turns, _ = conversation
    hurried = replace(turns[0], remaining_s=0.4)
    async with plane() as p, p.worker(PREFILL, "prefill-0") as prefill, p.worker(DECODE, "decode-0"):
        await met(prefill, 1)
        p.directory.gate.clear()
        async with connected(prefill) as router:
            await router.prefill.send(start_prefill=pb.StartPrefill(item=item_to_pb(hurried)))
            await router.prefill.expect(hurried.key, pb.Opened)
            assert (await prefill.metrics())["tandem_kv_fetch_timeouts_total"] == 1
        p.directory.gate.set()


@pytest.mark.parametrize(
    "off",
    [
        {"store__fetch": False, "store__offer": False},
        {"store__nodes": 0, "cluster__prefill": 0, "cluster__decode": 0, "cluster__colocated": 1},
    ],
)
async def test_nothing_runs_where_nothing_is_wanted(off, conversation):
    turns, answers = conversation
    async with plane() as p, p.worker(COLOCATED, "colocated-0", **off) as worker:
        assert await local(worker, turns[0]) == (answers[0], 0)
        assert (p.directory.joined, p.directory.located) == (0, 0)


async def test_nobody_is_asked_while_nobody_else_is_there(conversation):
    turns, answers = conversation
    async with plane() as p, p.worker(COLOCATED, "colocated-0") as worker:
        await until(lambda: p.directory.joined >= 2)
        assert await local(worker, turns[0]) == (answers[0], 0)
        assert p.directory.located == 0
