"""Pins over the Kv service, at a store and at a worker's node: bounded, kept against everything but a wrong digest, gone with
the process. And what lists say of blocks: how old, since when unused."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import grpc
import pytest
from kv_peers import KEYS, directory, peer
from store_rig import LAYOUT, bytes_of, keys_of, store_end, store_spec, worker_end
from transport_suite import until

from core.errors import PinLimitError
from kvtransfer.codec import digest_of
from kvtransfer.holds import HOLD_KEYS_MAX
from tandem.v1 import kv_pb2, kv_pb2_grpc

BLOCKS = 2**20 // LAYOUT.block_bytes
REFUSED, INVALID = grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT


async def pin(stub, keys, **fields):
    reply = await stub.Pin(kv_pb2.PinRequest(keys=keys, **fields), timeout=20)
    return reply.pinned, reply.pinned_blocks, reply.pinned_max


async def listed(stub):
    return [entry async for reply in stub.List(kv_pb2.ListRequest(), timeout=20) for entry in reply.entries]


@pytest.fixture
async def pair(tmp_path):
    async with worker_end(tmp_path) as worker, store_end(store_spec(tmp_path)) as store:
        yield worker, store.client, store


async def test_what_is_pinned_outlives_any_other_use_of_the_memory(pair):
    worker, client, _ = pair
    keys = keys_of("a", 12)
    await client.offer(worker, keys)
    assert await pin(client.stub, keys[:8] + keys_of("nobody's", 2)) == (8, 8, BLOCKS // 2)
    for n in range(3):
        await client.offer(worker, keys_of(f"fill {n}", BLOCKS // 2))
    assert set(await client.read(keys)) == set(keys[:8])
    assert {entry.key for entry in await listed(client.stub) if entry.pinned} == set(keys[:8])
    [dram] = (await client.stat()).values()
    assert (dram.pinned, dram.pinned_max) == (8, BLOCKS // 2)
    await client.stub.Evict(kv_pb2.EvictRequest(all=True), timeout=20)
    assert {entry.key for entry in await listed(client.stub)} == set(keys[:8])
    assert await pin(client.stub, keys[:3], unpin=True) == (3, 5, BLOCKS // 2)
    assert await pin(client.stub, [], unpin=True, all=True) == (5, 0, BLOCKS // 2)
    assert (await client.stub.Evict(kv_pb2.EvictRequest(all=True), timeout=20)).evicted == 8


@pytest.mark.parametrize(("share", "most"), [(0.0, 0), (0.25, BLOCKS // 4), (1.0, BLOCKS)])
async def test_beyond_the_configured_share_a_pin_is_refused_by_name_and_nothing_of_it_is_kept(share, most, tmp_path):
    spec = store_spec(tmp_path, store__pinned_share=share)
    async with worker_end(tmp_path) as worker, store_end(spec) as store:
        keys = keys_of("a", BLOCKS)
        for start in range(0, BLOCKS, 32):
            await store.client.offer(worker, keys[start : start + 32])
        stub = store.client.stub
        if most < BLOCKS:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await pin(stub, keys[: most + 1])
            assert refused.value.code() is REFUSED
            assert f"store-0: {most + 1} of {BLOCKS} blocks would be pinned here and {most} may be" in refused.value.details()
            assert "store.pinned_share" in refused.value.details()
        assert await pin(stub, []) == (0, 0, most)
        assert await pin(stub, keys[:most]) == (most, most, most)
        assert await pin(stub, keys[:most] * 2) == (most, most, most), "again changes nothing"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"keys": [b"short"]}, "16 bytes"),
        ({"keys": [bytes(16)] * (HOLD_KEYS_MAX + 1)}, "ask for at most"),
        ({"all": True}, "name the keys to pin"),
    ],
)
async def test_what_can_be_no_pin_is_refused(pair, fields, said):
    with pytest.raises(grpc.aio.AioRpcError, match=said) as refused:
        await pair[1].stub.Pin(kv_pb2.PinRequest(**fields), timeout=10)
    assert refused.value.code() is INVALID


async def test_a_store_that_has_not_seen_a_block_pins_none(tmp_path):
    async with store_end(store_spec(tmp_path)) as store:
        assert await pin(store.client.stub, keys_of("a", 3)) == (0, 0, 0)
        assert await pin(store.client.stub, [], unpin=True, all=True) == (0, 0, 0)


async def test_what_is_on_disk_alone_is_brought_up_and_pins_end_with_the_store(tmp_path):
    spec, keys = store_spec(tmp_path, tmp_path / "disk"), keys_of("a", 20)
    async with worker_end(tmp_path) as worker:
        async with store_end(spec) as store:
            await store.client.offer(worker, keys)
            await until(lambda: len(store.node.plane.disk.resident()) == 20)
            assert await store.node.plane.node.evict(keys[5:]) == 15
            assert (await pin(store.client.stub, keys))[:2] == (20, 20)
            pinned = [e for e in await listed(store.client.stub) if e.tier == kv_pb2.TIER_DRAM and e.pinned]
            assert len(pinned) == 20
            assert {e.key: e.digest for e in pinned} == {key: digest_of(bytes_of(key)) for key in keys}, "so rot is seen"
        async with store_end(replace(spec, epoch=spec.epoch + 1)) as store:
            assert len(await store.client.read(keys)) == 20
            assert not any(entry.pinned for entry in await listed(store.client.stub)), "soft state"


async def test_a_pinned_block_that_rots_is_dropped_all_the_same(pair, caplog):
    worker, client, store = pair
    keys = keys_of("a", 4)
    await client.offer(worker, keys)
    await pin(client.stub, keys)
    plane = store.node.plane
    [block] = plane.inventory.look(keys[1:2])
    plane.inventory.release([block])
    plane.arena.bytes_view()[block][7] ^= 1
    reply = await client.stub.Verify(kv_pb2.VerifyRequest(), timeout=20)
    assert (reply.checked, reply.dropped) == (4, 1)
    assert set(await client.read(keys)) == {keys[0], *keys[2:]}
    assert (await client.stat())[kv_pb2.TIER_DRAM].pinned == 3


async def test_a_worker_pins_too(tmp_path):
    place = directory()
    async with peer("prefill-0", place, tmp_path) as node:
        await node.put(KEYS[:10])
        async with grpc.aio.insecure_channel(node.record.source.grpc_address) as channel:
            stub = kv_pb2_grpc.KvStub(channel)
            assert await pin(stub, KEYS[:4]) == (4, 4, 32)
            node.inventory.release(node.inventory.allocate(60))
            assert {entry.key for entry in node.inventory.entries()} == set(KEYS[:4])
            await node.put(KEYS[10:60])
            with pytest.raises(PinLimitError, match="prefill-0"):
                await node.node.pin(KEYS[10:60])
            assert await pin(stub, [], unpin=True, all=True) == (4, 0, 32)


async def test_lists_tell_ages(tmp_path):
    spec, keys = store_spec(tmp_path, tmp_path / "disk"), keys_of("a", 3)
    loop = asyncio.get_running_loop()
    async with worker_end(tmp_path) as worker, store_end(spec) as store:
        started = loop.time()
        await store.client.offer(worker, keys, tenant=b"acme", cost_s=0.5)
        await until(lambda: len(store.node.plane.disk.resident()) == 3)
        await store.client.hold(keys[:1])
        await until(lambda: loop.time() > started + 0.3)
        entries = await listed(store.client.stub)
        passed = loop.time() - started
        memory = {e.key: e for e in entries if e.tier == kv_pb2.TIER_DRAM}
        disk = {e.key: e for e in entries if e.tier == kv_pb2.TIER_DISK}
        assert all(0.0 < e.age_s <= passed for e in memory.values())
        assert memory[keys[0]].idle_s == 0.0, "held"
        assert all(0.0 < memory[key].idle_s <= memory[key].age_s for key in keys[1:])
        assert all(e.HasField("idle_s") for e in memory.values())
        assert not any(e.HasField("idle_s") for e in disk.values())
        assert all(0.0 <= disk[key].age_s < 60.0 for key in keys)
        assert {(e.tenant, e.cost_s) for e in entries} == {(b"acme", 0.5)}
        await store.client.drop()
        at = loop.time()
        await until(lambda: loop.time() > at + 0.1)
        let_go = next(e for e in await listed(store.client.stub) if e.key == keys[0])
        assert 0.1 <= let_go.idle_s < let_go.age_s
