"""What a worker keeps for itself and what it gives to a store, whom its blocks are charged to, and which of them go first."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import grpc
import pytest
from plane_rig import COLOCATED, DECODE, PREFILL, SIZE, finished_keys, plane, split
from worker_harness import RunningWorker, again, connected, item, running

from core.blocks import block_keys
from core.config import load
from core.errors import ConfigError
from core.request import WorkItem
from tandem.v1 import kv_pb2, kv_pb2_grpc

pytestmark = pytest.mark.service


async def test_a_store_gets_exact_blocks_and_none_that_came_through_a_lossy_codec():
    ways = {"transfer__transport": "tcp", "transfer__codec": "int8"}
    async with (
        plane() as p,
        p.store(),
        p.worker(PREFILL, "prefill-0", **ways) as prefill,
        p.worker(DECODE, "decode-0", **ways) as decode,
    ):
        one, after = item("salted", 100, max_tokens=60), item("behind", 60, max_tokens=20)
        tokens, _ = await split(prefill, decode, one)
        exact, salted = (
            block_keys(decode.node.root_key(b"", codec), (*one.token_ids, *tokens)[:-1], SIZE) for codec in ("", "int8")
        )
        here = {entry.key for entry in decode.inventory.entries()}
        assert len(salted) == 9
        assert here >= set(salted), "three of them with generated tokens"
        async with connected(decode) as router:
            answer = await router.local(after)
        await p.knows(finished_keys(decode, after, answer), "store-0")  # what decode committed later is there
        await p.knows(exact[: one.prompt_len // SIZE], "store-0")  # prefill's
        for key in salted:
            assert not (await p.table.locate([key])).holders, "nobody looks these up"
        async with connected(prefill, decode) as router:
            assert (await router.reserve(again(one, 2))).cached_tokens == 96, "found where they are"
            await router.cancel(again(one, 2).key)


def of_tenant(name: str, tenant: bytes, length: int, **sampling: object) -> WorkItem:
    return replace(item(name, length, **sampling), cache_salt=tenant)  # type: ignore[arg-type]


async def test_blocks_are_charged_to_their_tenant_at_both_ends_of_a_hand_off():
    async with running(PREFILL) as prefill, running(DECODE) as decode, connected(prefill, decode) as router:
        one = of_tenant("mine", b"acme", 70, max_tokens=30)
        tokens = await router.split(one)
        keys = block_keys(decode.node.root_key(b"acme"), (*one.token_ids, *tokens)[:-1], SIZE)
        for worker, count in ((prefill, 4), (decode, 6)):
            assert {e.key: e.tenant for e in worker.inventory.entries()} == dict.fromkeys(keys[:count], b"acme")


async def test_a_tenant_beyond_its_share_of_a_worker_loses_its_own_blocks_first():
    async with running(COLOCATED, engine__tenant_share=0.5) as worker, connected(worker) as router:
        total = worker.inventory.counts().total
        quiet = of_tenant("quiet", b"quiet", 100, max_tokens=4)
        await router.local(quiet)
        await flood(router, worker, 2 * total, b"loud")
        assert resident(worker, quiet) == [True] * 6
        assert worker.inventory.tenants()[b"loud"] > total // 2, "nobody else wanted the room"


@pytest.mark.parametrize(("policy", "stays"), [("lru", False), ("lfu", True), ("cost", True)])
async def test_workers_evict_by_the_policy_of_their_configuration(policy, stays):
    async with running(COLOCATED, engine__eviction=policy) as worker, connected(worker) as router:
        hot = item("hot", 100, max_tokens=4)
        for attempt in range(1, 9):
            await router.local(again(hot, attempt))
        await flood(router, worker, worker.inventory.counts().total + 8, b"")
        assert resident(worker, hot) == [stays] * 6
        async with grpc.aio.insecure_channel(worker.info.grpc_address) as channel:
            stat = await kv_pb2_grpc.KvStub(channel).Stat(kv_pb2.StatRequest(), timeout=10)
        assert stat.policy == policy
        metrics = await worker.metrics()
        gone = metrics['tandem_kv_evictions_total{tier="dram"}']
        assert gone > 8
        assert metrics["tandem_kv_evicted_idle_seconds_count"] == gone
        assert metrics['tandem_kv_evicted_idle_seconds_bucket{le="86400.0"}'] == gone
        assert 0 < metrics["tandem_kv_evicted_idle_seconds_sum"] < gone * 60


@pytest.mark.parametrize("key", ["engine.eviction", "store.policy"])
def test_a_policy_that_nobody_knows_is_refused_with_those_there_are(key):
    with pytest.raises(ConfigError, match=rf"{key}.*'lru', 'lfu' or 'cost'.*fifo"):
        load(overrides={key: "fifo"})


async def test_a_worker_full_of_pins_still_takes_its_longest_request():
    async with running(COLOCATED, store__pinned_share=1.0, model__max_model_len=400) as worker, connected(worker) as router:
        total, most = worker.inventory.counts().total, worker.inventory.pinned_max
        assert most == total - 400 // SIZE - 1 > 0
        await flood(router, worker, total, b"")
        keys = [entry.key for entry in worker.inventory.entries()]
        async with grpc.aio.insecure_channel(worker.info.grpc_address) as channel:
            stub = kv_pb2_grpc.KvStub(channel)
            assert (await stub.Pin(kv_pb2.PinRequest(keys=keys[:most]), timeout=10)).pinned_blocks == most
            with pytest.raises(grpc.aio.AioRpcError, match=f"{worker.spec.worker_id}: {most + 1} of {total} blocks"):
                await stub.Pin(kv_pb2.PinRequest(keys=keys[most : most + 1]), timeout=10)
        longest = item("longest", 390, max_tokens=10)
        assert len(await asyncio.wait_for(router.local(longest), 20)) == 10
        assert (await worker.metrics())["tandem_kv_pinned_blocks"] == most


async def flood(router, worker: RunningWorker, blocks: int, tenant: bytes) -> None:
    """Prompts that are asked once, until so many blocks were committed."""
    for n in range(-(-blocks // 8)):
        one = of_tenant("flood", tenant, 128, max_tokens=2)
        tokens = tuple(2 + (n * 131 + 17 * i) % 500 for i in range(128))
        await asyncio.wait_for(router.local(replace(again(one, n + 1), token_ids=tokens)), 20)


def resident(worker: RunningWorker, one: WorkItem) -> list[bool]:
    found = worker.inventory.look(block_keys(worker.node.root_key(one.cache_salt), one.token_ids, SIZE))
    worker.inventory.release([block for block in found if block is not None])
    return [block is not None for block in found]
