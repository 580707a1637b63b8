"""Prefill and decode workers over every transport give the tokens of one colocated worker."""

import asyncio
from dataclasses import replace

import pytest
from worker_harness import again, connected, item, running

from core.request import WorkerRole
from tandem.v1 import common_pb2 as pb

pytestmark = pytest.mark.service
PREFILL, DECODE, COLOCATED = WorkerRole.PREFILL, WorkerRole.DECODE, WorkerRole.COLOCATED

# Around the edges of blocks (16) and chunks (32); greedy and seeded.
ITEMS = [
    *(item(f"greedy-{length}", length) for length in (1, 15, 16, 17, 32, 33, 100)),
    *(item(f"seeded-{length}", length, temperature=0.9, top_p=0.95, seed=length) for length in (1, 16, 31, 64, 97)),
    item("penalised", 40, temperature=0.7, seed=5, repetition_penalty=1.2, logprobs=3),
    item("one token", 48, max_tokens=1),
]


@pytest.fixture(scope="module")
def colocated_tokens():
    async def compute():
        async with running(COLOCATED) as worker, connected(worker) as router:
            return [await router.local(one) for one in ITEMS]

    return asyncio.run(compute())


@pytest.mark.parametrize("transport", ["loopback", "shm", "grpc"])
async def test_split_tokens_are_those_of_one_worker(transport, colocated_tokens):
    async with (
        running(PREFILL, transfer__transport=transport) as prefill,
        running(DECODE, transfer__transport=transport) as decode,
        connected(prefill, decode) as router,
    ):
        alone = [await router.split(one) for one in ITEMS]
        assert alone == colocated_tokens
        # once more, all at the same time; the prompts are in the caches of both sides now
        together = await asyncio.gather(*(router.split(again(one, 2)) for one in ITEMS))
        assert together == colocated_tokens
        await prefill.settled()
        await decode.settled()


async def test_a_continuation_gives_the_tokens_of_the_undisturbed_run(colocated_tokens):
    """What failover does: prompt and delivered tokens go to another placement, split or whole."""
    async with running(PREFILL) as prefill, running(DECODE) as decode, connected(prefill, decode) as router:
        for one, tokens in zip(ITEMS[:-1], colocated_tokens, strict=False):
            continued = await router.split(again(one, 1, *tokens[:5]))
            assert tokens[:5] + continued == tokens
            assert tokens[:9] + await router.local(again(one, 2, *tokens[:9])) == tokens


async def test_timings_and_counts_of_a_hand_off():
    long = item("long", 320)
    async with (
        running(PREFILL, transfer__transport="shm") as prefill,
        running(DECODE, transfer__transport="shm") as decode,
        connected(prefill, decode) as router,
    ):
        assert (await router.reserve(long)).cached_tokens == 0
        opened = await router.start(long)
        assert opened.ticket.source.worker_id == "prefill-0"
        await router.hand_off(long, opened)
        await router.prefill.expect(long.key, pb.GeneratedToken)
        done = await router.prefill.expect(long.key, pb.PrefillDone)
        joined = await router.decode.expect(long.key, pb.Joined)
        first = await router.decode.expect(long.key, pb.GeneratedToken)
        assert first.position == 1
        assert done.timing.prefill_s > 0
        assert joined.timing.transport == "shm"
        assert joined.timing.transfer_bytes == 20 * prefill.node.layout.block_bytes
        assert 0 < joined.timing.transfer_s < 5
        assert joined.timing.transfer_exposed_s < done.timing.prefill_s
        await router.decode.tokens(long.key)
        cached = replace(again(long, 2), choice=1)
        assert (await router.reserve(cached)).cached_tokens == 320
