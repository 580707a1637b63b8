"""Real workers with codecs between them: lossless ones change no token, lossy ones never leave a block under an exact key."""

from __future__ import annotations

import asyncio

import pytest
from worker_harness import RunningWorker, again, connected, item, running

from core.blocks import BlockKey, block_keys
from core.request import WorkerRole, WorkItem

pytestmark = pytest.mark.service
PREFILL, DECODE, COLOCATED = WorkerRole.PREFILL, WorkerRole.DECODE, WorkerRole.COLOCATED
SIZE = 16

# Around the edges of blocks (16) and chunks (32); greedy and seeded.
ITEMS = [
    *(item(f"greedy-{length}", length, max_tokens=20) for length in (1, 15, 16, 33, 100)),
    *(item(f"seeded-{length}", length, max_tokens=20, temperature=0.9, seed=length) for length in (17, 64, 97)),
]


@pytest.fixture(scope="module")
def exact_tokens():
    async def compute():
        async with running(COLOCATED) as worker, connected(worker) as router:
            return [await router.local(one) for one in ITEMS]

    return asyncio.run(compute())


def keys_of(worker: RunningWorker, one: WorkItem, tokens: list[int], codec: str = "") -> list[BlockKey]:
    """Of the blocks that are full once all but the last token have their KV."""
    return block_keys(worker.node.root_key(b"", codec), (*one.token_ids, *tokens[:-1]), SIZE)


def resident(worker: RunningWorker, keys: list[BlockKey]) -> list[bool]:
    out = []
    for key in keys:
        blocks = worker.inventory.match([key])
        worker.inventory.release(blocks)
        out.append(bool(blocks))
    return out


def told(worker: RunningWorker) -> set[BlockKey]:
    """Blocks that directory, store and routers hear of."""
    log = worker.inventory.follow()
    added = worker.inventory.changes(10_000, log=log).added
    worker.inventory.unfollow(log)
    return set(added)


async def encoded_blocks(worker: RunningWorker, transport: str, codec: str) -> float:
    name = f'tandem_kv_encoded_blocks_total{{codec="{codec}",transport="{transport}"}}'
    return (await worker.metrics()).get(name, 0.0)


@pytest.mark.parametrize("codec", ["raw", "planes", "auto"])
@pytest.mark.parametrize("transport", ["tcp", "grpc"])
async def test_lossless_codecs_change_no_token(transport, codec, exact_tokens):
    ways = {"transfer__transport": transport, "transfer__codec": codec}
    async with running(PREFILL, **ways) as prefill, running(DECODE, **ways) as decode, connected(prefill, decode) as router:
        assert [await router.split(one) for one in ITEMS] == exact_tokens
        assert await asyncio.gather(*(router.split(again(one, 2)) for one in ITEMS)) == exact_tokens
        assert bool(await encoded_blocks(decode, transport, "planes")) == (codec == "planes")
        for one, tokens in zip(ITEMS, exact_tokens, strict=True):
            assert all(resident(decode, keys_of(decode, one, tokens))), "what was pulled and generated is found again"
        await prefill.settled()
        await decode.settled()


@pytest.mark.parametrize("transport", ["tcp", "grpc"])
async def test_what_came_lossy_never_lies_under_an_exact_key(transport, exact_tokens):
    ways = {"transfer__transport": transport, "transfer__codec": "int8"}
    async with running(PREFILL, **ways) as prefill, running(DECODE, **ways) as decode, connected(prefill, decode) as router:
        for one, exact in zip(ITEMS, exact_tokens, strict=True):
            tokens = await router.split(one)
            assert tokens[0] == exact[0], "the first token is prefill's own"
            assert not any(resident(decode, keys_of(decode, one, tokens)))
            salted = keys_of(decode, one, tokens, "int8")
            assert all(resident(decode, salted))
            assert len(salted) > len(one.token_ids) // SIZE or one.prompt_len % SIZE == 0, "a generated block is among them"
            assert not told(decode) & set(salted), "nobody else looks them up, so nobody hears of them"
            reused = (await router.reserve(again(one, 2))).cached_tokens
            assert reused == one.prompt_len // SIZE * SIZE
            await router.cancel(again(one, 2).key)
        assert await encoded_blocks(decode, transport, "int8")
        # Whole requests are computed here as if nothing lossy had ever been near.
        assert [await router.local(again(one, 3)) for one in ITEMS] == exact_tokens
        assert {key for one in ITEMS for key in keys_of(decode, one, [])} <= told(decode)
        await prefill.settled()
        await decode.settled()


async def test_exact_blocks_stay_exact_in_front_of_lossy_ones(exact_tokens):
    one = ITEMS[4]
    ways = {"transfer__transport": "tcp", "transfer__codec": "int8"}
    async with running(PREFILL, **ways) as prefill, running(DECODE, **ways) as decode, connected(prefill, decode) as router:
        await router.local(item("greedy-100", 40, max_tokens=1))  # the same prompt's beginning: two full blocks, exact
        bytes_before = exact_blocks(decode, one)
        assert len(bytes_before) == 2
        tokens = await router.split(again(one, 2))
        assert exact_blocks(decode, one) == bytes_before
        assert resident(decode, keys_of(decode, one, tokens))[2:] == [False] * 5
        assert resident(decode, keys_of(decode, one, tokens, "int8")) == [False, False, *[True] * 5]
        assert (await router.reserve(again(one, 3))).cached_tokens == 96
        await router.cancel(again(one, 3).key)
        assert await router.local(again(one, 4)) == exact_tokens[4]
        await decode.settled()


def exact_blocks(worker: RunningWorker, one: WorkItem) -> list[bytes]:
    blocks = worker.inventory.match(keys_of(worker, one, []))
    worker.inventory.release(blocks)
    return [worker.node.arena.bytes_view()[block].tobytes() for block in blocks]


async def test_shared_memory_moves_exact_blocks_whatever_the_codec(exact_tokens):
    ways = {"transfer__transport": "shm", "transfer__codec": "int8"}
    async with running(PREFILL, **ways) as prefill, running(DECODE, **ways) as decode, connected(prefill, decode) as router:
        assert [await router.split(one) for one in ITEMS] == exact_tokens
        for one, tokens in zip(ITEMS, exact_tokens, strict=True):
            assert all(resident(decode, keys_of(decode, one, tokens)))


async def test_a_puller_that_was_not_told_of_a_lossy_codec_gets_every_bit(exact_tokens):
    async with (
        running(PREFILL, transfer__transport="tcp", transfer__codec="int8") as prefill,
        running(DECODE, transfer__transport="tcp") as decode,
        connected(prefill, decode) as router,
    ):
        assert [await router.split(one) for one in ITEMS] == exact_tokens
        assert not await encoded_blocks(decode, "tcp", "int8")
