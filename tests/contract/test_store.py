"""A store node: what is offered can be read back, whatever happens on the way, and nobody holds more than he was granted."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
from dataclasses import replace

import grpc
import pytest
from store_rig import LAYOUT, STORE_EPOCH, bytes_of, keys_of, outcome, store_end, store_spec, worker_end
from transport_suite import until

from core.errors import ConfigError
from core.request import AttemptKey
from core.wire import layout_to_pb, source_to_pb
from kvtransfer import main as store_main
from kvtransfer import store_offers, store_plane
from tandem.v1 import kv_pb2

UNAVAILABLE, INVALID = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INVALID_ARGUMENT
OVERLOADED = grpc.StatusCode.RESOURCE_EXHAUSTED
DRAM, DISK = kv_pb2.TIER_DRAM, kv_pb2.TIER_DISK
BLOCKS = 2**20 // LAYOUT.block_bytes


@pytest.fixture
async def pair(tmp_path):
    async with worker_end(tmp_path) as worker, store_end(store_spec(tmp_path)) as store:
        yield worker, store


@pytest.fixture
def mute_address():
    """Somebody listens there and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.parametrize("transport", ["auto", "shm", "grpc"])
async def test_what_is_offered_can_be_read_back(transport, tmp_path):
    keys = keys_of("a", 12)
    async with worker_end(tmp_path) as worker, store_end(store_spec(tmp_path, transfer__transport=transport)) as store:
        assert outcome(await store.client.offer(worker, keys)) == (12, 0, 0)
        assert outcome(await store.client.offer(worker, keys[:6] + keys_of("b", 2))) == (2, 6, 0)
        expected = {key: bytes_of(key).tobytes() for key in keys}
        assert await store.client.read(keys) == expected
        [dram] = (await store.client.stat()).values()
        assert (dram.blocks, dram.hits) == (14, 12)
        assert dram.blocks_max == BLOCKS


async def test_an_offer_cancelled_while_memory_is_taken_does_not_stand_in_the_way_of_the_next(tmp_path, monkeypatch):
    taken, go_on = threading.Event(), threading.Event()
    original = store_plane.open_arena

    def slow(*args):
        arena = original(*args)
        taken.set()
        assert go_on.wait(20)
        return arena

    monkeypatch.setattr(store_plane, "open_arena", slow)
    async with worker_end(tmp_path) as worker, store_end(store_spec(tmp_path)) as store:
        first = asyncio.create_task(store.node._plane_for(LAYOUT))
        assert await asyncio.to_thread(taken.wait, 20)
        first.cancel()
        second = asyncio.create_task(store.client.offer(worker, keys_of("a", 2)))
        await asyncio.wait([first, second], timeout=0.1)
        go_on.set()
        assert outcome(await second) == (2, 0, 0)
        assert first.cancelled()


async def test_a_fresh_store_knows_nothing_and_says_so(tmp_path):
    async with store_end(store_spec(tmp_path)) as store:
        stat = await store.client.stub.Stat(kv_pb2.StatRequest(), timeout=10)
        assert (stat.worker_id, stat.epoch) == ("store-0", STORE_EPOCH)
        assert not stat.HasField("layout")
        assert not stat.tiers
        assert store.node.record().layout is None
        assert not (await store.client.hold(keys_of("a", 3))).records
        assert not await store.client.drop()
        assert (await store.client.stub.Evict(kv_pb2.EvictRequest(all=True), timeout=10)).evicted == 0
        assert (await store.client.stub.Verify(kv_pb2.VerifyRequest(), timeout=10)).checked == 0
        assert [e async for e in store.client.stub.List(kv_pb2.ListRequest(), timeout=10)] == []
        assert not list(tmp_path.iterdir()), "no memory is taken before there is anything to keep"


async def test_the_first_offer_says_what_a_block_is_and_others_are_refused_by_name(pair, tmp_path):
    worker, store = pair
    await store.client.offer(worker, keys_of("a", 2))
    assert store.node.record().layout == LAYOUT
    for other, name in (
        (replace(LAYOUT, fingerprint=b"\x02" * 16), "fingerprint differs"),
        (replace(LAYOUT, block_size=32), "block_size differs"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await store.client.offer(worker, keys_of("b", 1), layout=layout_to_pb(other))
        assert caught.value.code() is UNAVAILABLE
        assert name in caught.value.details()
        with pytest.raises(grpc.aio.AioRpcError, match=name):
            await store.client.hold(keys_of("a", 1), layout=layout_to_pb(other))


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"epoch": STORE_EPOCH - 1}, UNAVAILABLE, "epoch 9"),
        ([kv_pb2.BlockRecord(index=0, block_id=1)], INVALID, "full blocks"),
        ([kv_pb2.BlockRecord(index=0, key=b"k" * 16)] * 5000, INVALID, "offer at most"),
        ([kv_pb2.BlockRecord(index=0, key=b"k" * 16)] * 2, INVALID, "same place"),
        ([kv_pb2.BlockRecord(key=b"short")], INVALID, "16 bytes"),
        ({"tenant": b"x" * 1025}, INVALID, "at most 1024"),
        ({"cost_s": float("nan")}, INVALID, "cannot take nan s"),
        ({"cost_s": -1.0}, INVALID, "cannot take -1 s"),
    ],
)
async def test_bad_offers_are_refused(pair, change, status, message):
    worker, store = pair
    changes = change if isinstance(change, dict) else {"records": change}
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await store.client.offer_records(worker, AttemptKey("hold/offer/x", 1), [], **changes)
    assert caught.value.code() is status
    assert message in caught.value.details()


async def test_blocks_that_the_worker_lost_meanwhile_are_refused_and_the_rest_is_taken(pair):
    worker, store = pair
    keys, holder = keys_of("a", 8), AttemptKey("hold/offer/x", 1)
    worker.compute(keys)
    records = await worker.records(holder, keys)
    records[3] = replace(records[3], generation=records[3].generation - 1)
    assert outcome(await store.client.offer_records(worker, holder, records)) == (7, 0, 1)
    assert set(await store.client.read(keys)) == set(keys) - {keys[3]}
    worker.exports.drop(holder)


async def test_a_block_whose_bytes_are_not_what_its_digest_says_is_not_taken(pair):
    worker, store = pair
    keys, holder = keys_of("a", 8), AttemptKey("hold/offer/x", 1)
    worker.compute(keys)
    records = await worker.records(holder, keys)
    worker.arena.bytes_view()[records[5].block_id, 7] ^= 1
    assert outcome(await store.client.offer_records(worker, holder, records)) == (7, 0, 1)
    assert set(await store.client.read(keys)) == set(keys) - {keys[5]}
    assert (await store.client.stub.Stat(kv_pb2.StatRequest(), timeout=10)).digest_failures == 1
    worker.exports.drop(holder)


async def test_an_offer_of_a_worker_that_is_gone_is_refused_whole(pair):
    worker, store = pair
    keys, holder = keys_of("a", 3), AttemptKey("hold/offer/x", 1)
    worker.compute(keys)
    records = await worker.records(holder, keys)
    worker.exports.drop(holder)
    gone = replace(worker, source=replace(worker.source, grpc_address="127.0.0.1:1", arena_path="", transports=("grpc",)))
    assert outcome(await store.client.offer_records(gone, holder, records)) == (0, 0, 3)
    newer = replace(worker, source=replace(worker.source, epoch=99))
    assert outcome(await store.client.offer_records(newer, holder, records)) == (0, 0, 3)


async def test_two_workers_may_offer_the_same_blocks_at_once(pair, tmp_path):
    worker, store = pair
    keys = keys_of("a", 64)
    async with worker_end(tmp_path, name="prefill-1") as other:
        replies = await asyncio.gather(*(store.client.offer(w, keys) for w in (worker, other, worker, other)))
        assert sum(reply.taken for reply in replies) == 64
        assert all(reply.taken + reply.known == 64 for reply in replies)
        assert len(await store.client.read(keys)) == 64


async def test_a_full_store_evicts_what_nobody_holds_and_never_what_is_held(pair):
    worker, store = pair
    held = keys_of("held", 10)
    await store.client.offer(worker, held)
    await store.client.hold(held)
    for round_ in range(3):
        await store.client.offer(worker, keys_of(f"fill {round_}", 100))
    assert len(await store.client.read(held, AttemptKey("hold/reader/2", 1))) == 10
    [dram] = (await store.client.stat()).values()
    assert dram.evictions == 310 - BLOCKS
    assert await store.client.drop()


async def test_an_offer_finds_no_room_when_everything_is_held(pair):
    worker, store = pair
    keys = keys_of("a", BLOCKS)
    assert outcome(await store.client.offer(worker, keys)) == (BLOCKS, 0, 0)
    await store.client.hold(keys)
    assert outcome(await store.client.offer(worker, keys_of("b", 4))) == (0, 0, 4)
    assert await store.client.drop()
    assert outcome(await store.client.offer(worker, keys_of("b", 4))) == (4, 0, 0)


async def test_a_tenant_keeps_to_its_share(tmp_path):
    spec = store_spec(tmp_path, store__tenant_share=0.5)
    async with worker_end(tmp_path) as worker, store_end(spec) as store:
        quiet = keys_of("quiet", 20)
        await store.client.offer(worker, quiet, tenant=b"quiet")
        for round_ in range(4):
            await store.client.offer(worker, keys_of(f"loud {round_}", 100), tenant=b"loud")
        assert len(await store.client.read(quiet)) == 20


async def test_a_reader_that_never_renews_loses_its_hold(pair):
    worker, store = pair
    keys = keys_of("a", 4)
    await store.client.offer(worker, keys)
    await store.client.hold(keys, lease_s=0.05)
    await until(lambda: not store.node.plane.inventory.leases_open())
    assert store.node.plane.inventory.counts().active == 0
    assert not await store.client.drop()


async def test_offers_beyond_the_bound_are_turned_away(pair, mute_address, monkeypatch):
    monkeypatch.setattr(store_offers, "OFFERS_RUNNING", 1)
    monkeypatch.setattr(store_offers, "OFFERS_WAITING_MAX", 0)
    worker, store = pair
    mute = replace(worker.source, worker_id="mute", host_id="elsewhere", grpc_address=mute_address, transports=("grpc",))
    running = asyncio.create_task(store.client.offer(worker, keys_of("first", 4), source=source_to_pb(mute)))
    await until(lambda: len(store.node.offers) == 1)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await store.client.offer(worker, keys_of("second", 4))
    assert refused.value.code() == OVERLOADED
    assert store.node.offers.stats.turned_away == 1
    running.cancel()
    await until(lambda: len(store.node.offers) == 0)
    assert outcome(await store.client.offer(worker, keys_of("third", 4))) == (4, 0, 0)


async def test_bytes_that_rot_in_memory_are_found_dropped_and_counted(pair):
    worker, store = pair
    keys = keys_of("a", 6)
    await store.client.offer(worker, keys)
    [record] = (await store.client.hold(keys[2:3])).records
    store.node.plane.arena.bytes_view()[record.block_id, 0] ^= 0x80
    reply = await store.client.stub.Verify(kv_pb2.VerifyRequest(), timeout=10)
    assert (reply.checked, reply.dropped) == (6, 1)
    assert len((await store.client.hold(keys, AttemptKey("hold/reader/2", 1))).records) == 6, "still held by a reader"
    assert await store.client.drop(AttemptKey("hold/reader/2", 1))
    assert await store.client.drop()
    await until(lambda: store.node.plane.inventory.counts().free == BLOCKS - 5)
    assert set(await store.client.read(keys)) == set(keys) - {keys[2]}
    assert (await store.client.stub.Stat(kv_pb2.StatRequest(), timeout=10)).digest_failures == 1
    assert outcome(await store.client.offer(worker, keys)) == (1, 5, 0)
    assert len(await store.client.read(keys)) == 6


async def test_tools_list_and_evict(pair):
    worker, store = pair
    keys = keys_of("a", 5)
    await store.client.offer(worker, keys, tenant=b"acme")
    entries = [e async for reply in store.client.stub.List(kv_pb2.ListRequest(), timeout=10) for e in reply.entries]
    assert {e.key for e in entries} == set(keys)
    assert {(e.tier, e.bytes, e.tenant, e.pinned) for e in entries} == {(DRAM, LAYOUT.block_bytes, b"acme", False)}
    limited = [e async for reply in store.client.stub.List(kv_pb2.ListRequest(limit=2), timeout=10) for e in reply.entries]
    assert len(limited) == 2
    await store.client.hold(keys[:1])
    assert (await store.client.stub.Evict(kv_pb2.EvictRequest(keys=keys[:2]), timeout=10)).evicted == 1, "one is held"
    assert (await store.client.stub.Evict(kv_pb2.EvictRequest(all=True), timeout=10)).evicted == 3
    await store.client.drop()
    assert list(await store.client.read(keys)) == keys[:1]


# ---- memory and start --------------------------------------------------------------------------------------------


async def test_more_memory_than_there_is_is_refused_at_the_start(tmp_path):
    spec = store_spec(tmp_path, store__dram_bytes=2**60)
    with pytest.raises(ConfigError, match=r"store\.dram_bytes asks for .* free"):
        await store_main.run(spec, asyncio.Event())
    with pytest.raises(ConfigError, match="cannot be used"):
        await store_main.run(store_spec(tmp_path / "missing"), asyncio.Event())


async def test_blocks_too_large_for_the_store_are_refused_with_what_to_change(tmp_path):
    large = replace(LAYOUT, num_layers=1024)
    async with worker_end(tmp_path, blocks=4, layout=large) as worker, store_end(store_spec(tmp_path)) as store:
        with pytest.raises(grpc.aio.AioRpcError, match="raise it to at least"):
            await store.client.offer(worker, keys_of("a", 1, large))


def test_a_store_never_loads_torch():
    code = "import sys, kvtransfer.main; assert 'torch' not in sys.modules, 'torch was loaded'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
