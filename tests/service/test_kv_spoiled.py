"""Bytes that changed where they lay, in a worker's memory, a store's memory or on its disk: whoever fetches them notices,
drops and counts them and computes them anew, and the answer is the one it always was.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from plane_rig import DECODE, PREFILL, SIZE, Plane, converse, finished_keys, met, plane, split
from worker_harness import RunningWorker, again, connected, until

from core.request import WorkItem
from kvtransfer.loopback import PROCESS_HUB
from tandem.v1 import common_pb2 as pb

pytestmark = pytest.mark.service
FAILURES = "tandem_kv_digest_failures_total"
Conversation = tuple[list[WorkItem], list[list[int]]]


@pytest.fixture(scope="module")
def conversation() -> Conversation:
    return asyncio.run(converse())


async def first_turn(p: Plane, conversation: Conversation, holder: str) -> list[bytes]:
    """Computed by two workers that are gone afterwards; the keys of its full blocks, which `holder` has."""
    turns, answers = conversation
    async with p.worker(PREFILL, "prefill-0") as prefill, p.worker(DECODE, "decode-0") as decode:
        tokens, _ = await split(prefill, decode, turns[0])
        assert tokens == answers[0]
        kept = finished_keys(prefill, turns[0], tokens)
        await p.knows(kept, holder)
    return kept


async def second_turn(p: Plane, conversation: Conversation, peers: int, **how) -> tuple[int, dict[str, float]]:
    """By two new workers: the answer is right. How many tokens of its prompt had KV, and what prefill counted."""
    turns, answers = conversation
    async with p.worker(PREFILL, "prefill-1", **how) as prefill, p.worker(DECODE, "decode-1", **how) as decode:
        await met(prefill, peers + 1)
        tokens, cached = await split(prefill, decode, turns[1])
        assert tokens == answers[1], "the answer stays right"
        await prefill.settled()
        return cached, await prefill.metrics()


def spoil(worker: RunningWorker, keys: list[bytes]) -> None:
    """A bit of each of these blocks flips."""
    blocks = worker.inventory.match(keys)
    assert len(blocks) == len(keys)
    for block in blocks:
        worker.node.arena.bytes_view()[block, 77] ^= 1
    worker.inventory.release(blocks)


@pytest.mark.parametrize("transport", ["shm", "tcp", "grpc", "loopback"])
async def test_in_the_memory_of_other_workers(transport, conversation):
    turns, _ = conversation
    how = {"transfer__transport": transport}
    async with plane() as p, p.worker(PREFILL, "prefill-0", **how) as prefill, p.worker(DECODE, "decode-0", **how) as decode:
        tokens, _ = await split(prefill, decode, turns[0])
        kept = finished_keys(prefill, turns[0], tokens)
        await p.knows(kept, "prefill-0", "decode-0")
        sent = kept[: turns[0].prompt_len // SIZE]  # their digests crossed with them
        spoil(prefill, sent[1:])
        spoil(decode, sent[1:])
        cached, counted = await second_turn(p, conversation, 2, **how)
        assert cached < SIZE * len(kept)
        assert counted[FAILURES] >= 1
        await until(lambda: not resident(prefill, sent[1:]) and not resident(decode, sent[1:]))  # both were asked, and told


def resident(worker: RunningWorker, keys: list[bytes]) -> int:
    blocks = worker.inventory.look(keys)
    worker.inventory.release([block for block in blocks if block is not None])
    return sum(block is not None for block in blocks)


async def test_in_the_memory_of_a_store(conversation):
    async with plane() as p, p.store():
        kept = await first_turn(p, conversation, "store-0")
        [store] = await p.table.nodes()
        PROCESS_HUB.find(store.source).bytes_view()[:, 77] ^= 1
        cached, counted = await second_turn(p, conversation, 1)
        assert cached == 0, "none of them was whole"
        assert counted[FAILURES] >= 1
        assert counted["tandem_kv_missed_blocks_total"] >= len(kept)


async def test_on_the_disk_of_a_store(conversation, tmp_path: Path):
    disk = {"store__disk_dir": str(tmp_path), "store__disk_bytes": 2**26}
    async with plane() as p:
        async with p.store(**disk):
            kept = await first_turn(p, conversation, "store-0")
        spoil_segments(tmp_path)
        async with p.store(**disk):
            await p.knows(kept, "store-0")
            cached, counted = await second_turn(p, conversation, 1)
        assert cached == 0
        assert counted["tandem_kv_missed_blocks_total"] >= len(kept)


def spoil_segments(directory: Path) -> None:
    [segment] = directory.glob("**/*.seg*")
    whole = bytearray(segment.read_bytes())
    for place in range(9000, len(whole), 1000):  # behind the head
        whole[place] ^= 1
    segment.write_bytes(whole)


async def test_on_the_way_of_a_hand_off(conversation):
    """The attempt fails so that it is placed again; the worker that gave the bytes hears of it and computes them anew."""
    [turn, *_], [answer, *_] = conversation
    alone = {"store__fetch": False}
    async with (
        plane() as p,
        p.worker(PREFILL, "prefill-0", **alone) as bad,
        p.worker(PREFILL, "prefill-1", **alone) as good,
        p.worker(DECODE, "decode-0", **alone) as decode,
    ):
        keys = finished_keys(bad, turn, [])
        async with connected(bad, decode) as router:
            await router.reserve(turn)
            opened = await router.start(turn)
            [first] = await router.prefill.tokens(turn.key, 1)
            assert first.token_id == answer[0]
            await until(lambda: all(entry.digest for entry in bad.inventory.entries()))
            spoil(bad, keys)
            await router.hand_off(turn, opened)
            failed = await router.decode.expect(turn.key, pb.AttemptFailed)
            assert (failed.code, failed.retryable) == ("digest_mismatch", True)
            await router.cancel(turn.key)
            assert not resident(decode, keys), "nothing of it is findable"
            assert (await decode.metrics())[FAILURES] >= 1
        async with connected(good, decode, peer_id="router-2") as router:
            assert await router.split(again(turn, 2)) == answer
        await until(lambda: not resident(bad, keys))
        decode.inventory.evict([entry.key for entry in decode.inventory.entries()])
        async with connected(bad, decode, peer_id="router-3") as router:
            assert await router.split(again(turn, 3)) == answer
