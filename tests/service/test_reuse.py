"""KV computed anywhere is used everywhere: by the next turn on other workers, and after those that computed it are gone."""

from __future__ import annotations

import asyncio
import re
from contextlib import nullcontext
from dataclasses import replace

import pytest
from plane_rig import COLOCATED, DECODE, PREFILL, SIZE, converse, finished_keys, local, met, plane, split
from worker_harness import RunningWorker, again, connected, until

from core.request import WorkItem
from core.wire import item_to_pb
from tandem.v1 import common_pb2 as pb

pytestmark = pytest.mark.service


@pytest.fixture(scope="module")
def conversation() -> tuple[list[WorkItem], list[list[int]]]:
    """Three turns and their answers, by one worker alone that fetches nothing."""
    return asyncio.run(converse())


# (transport, codec); where no network lies between the ends a codec changes nothing.
WAYS = [
    *((transport, codec) for transport in ("tcp", "grpc") for codec in ("raw", "planes")),
    *((transport, "raw") for transport in ("shm", "loopback", "collective")),
]


@pytest.mark.parametrize(("transport", "codec"), WAYS)
@pytest.mark.parametrize("with_store", [False, True])
async def test_later_turns_on_other_workers_reuse_every_full_block(transport, codec, with_store, conversation):
    """Turn 2 meets workers that have nothing; turn 3 the first ones, which lack what the others added."""
    turns, answers = conversation
    how = {"transfer__transport": transport, "transfer__codec": codec}
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
            ways = await ways_of(worker)
            assert transport in ways
            if transport != "collective" or not with_store:  # a store has no part in groups: it is read over grpc
                assert ways == {transport} | ({"planes"} if codec == "planes" else set())


async def ways_of(worker: RunningWorker) -> set[str]:
    """The transports by which blocks came here, and the codecs that they passed."""
    counted = ("tandem_kv_transferred_bytes_total", "tandem_kv_encoded_blocks_total")
    moved = [name for name, value in (await worker.metrics()).items() if value and name.startswith(counted)]
    return {label for name in moved for label in re.findall(r'"(\w+)"', name)}


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
