"""Reading by key: what is here is leased and can be pulled by every transport, and nobody holds it longer than granted."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import grpc
import numpy as np
import pytest

from core.blocks import KvLayout, KvSource, block_keys, root_key
from core.clock import ManualClock
from core.config import TransferConfig
from core.errors import InvalidRequestError, LeaseExpiredError, OverloadedError
from core.inventory import Inventory
from core.request import AttemptKey, WorkerRole
from core.service import Registration, serve
from core.wire import key_to_pb, layout_to_pb, record_from_pb, source_from_pb
from kvtransfer import exports as exports_module
from kvtransfer.arena import Arena, HostArena, host_id
from kvtransfer.channels import Channels
from kvtransfer.codec import digest_of
from kvtransfer.exports import Exports
from kvtransfer.handoff import ExportState
from kvtransfer.holds import HOLD_KEYS_MAX, HOLD_LEASE_MAX_S
from kvtransfer.kv_node import KvNode
from kvtransfer.kv_service import KvNodeServicer
from kvtransfer.loopback import LoopbackHub
from kvtransfer.plane import build_transports, offered, open_arena, open_tcp
from tandem.v1 import kv_pb2, kv_pb2_grpc

UNAVAILABLE, INVALID = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INVALID_ARGUMENT
LAYOUT = KvLayout(b"\x01" * 16, "float32", 2, 2, 8, 16)
EPOCH = 4
HOLDER = AttemptKey("hold/decode-0/1", 1)
KEYS = block_keys(root_key(LAYOUT.fingerprint), range(16 * 12), LAYOUT.block_size)


@dataclass
class World:
    clock: ManualClock
    arena: Arena
    inventory: Inventory
    exports: Exports
    node: KvNode

    def put(self, keys=KEYS):
        """Committed blocks of random bytes, held by nobody."""
        blocks = self.inventory.allocate(len(keys))
        for block, key in zip(blocks, keys, strict=True):
            self.arena.bytes_view()[block] = np.random.default_rng(list(key)).integers(0, 256, LAYOUT.block_bytes, np.uint8)
            self.inventory.commit(block, key)
        self.inventory.release(blocks)
        return blocks


@asynccontextmanager
async def world(arena=None, digest=True, source=None):
    clock = ManualClock(100.0)
    arena = arena or HostArena(16, LAYOUT.block_bytes)
    inventory = Inventory(16, arena.generation_words())
    exports = Exports(EPOCH, arena, inventory, clock, digest=digest, layout=LAYOUT)
    here = source or KvSource("store-0", EPOCH, "")
    yield World(clock, arena, inventory, exports, KvNode(exports, inventory, LAYOUT, lambda: here, WorkerRole.STORE))
    await exports.close()
    arena.close()
    inventory.check()
    assert not inventory.leases_open()
    assert not inventory.counts().active, "a block is held by nobody who could give it back"


async def test_a_hold_names_what_is_here_and_keeps_it():
    async with world() as w:
        blocks = w.put(KEYS[:3])
        records = await w.exports.hold(HOLDER, [KEYS[5], *KEYS[:3], KEYS[7]], 5.0)
        assert [(r.index, r.key, r.block_id, r.num_tokens) for r in records] == [
            (place, key, block, 16) for place, key, block in zip((1, 2, 3), KEYS[:3], blocks, strict=True)
        ]
        assert [r.digest for r in records] == [digest_of(w.arena.bytes_view()[b]) for b in blocks]
        assert w.inventory.counts().active == 3
        w.exports.check_readable(HOLDER, EPOCH, [(r.block_id, r.generation) for r in records])
        assert w.exports.holds_open == 1
        assert len(w.exports) == 0, "holds are no hand-offs"
        assert w.exports.drop(HOLDER)
        assert not w.exports.drop(HOLDER)
        assert w.inventory.counts().active == 0
        with pytest.raises(LeaseExpiredError):
            w.exports.find(HOLDER, EPOCH)


async def test_without_digests_none_is_computed():
    async with world(digest=False) as w:
        w.put(KEYS[:2])
        assert [r.digest for r in await w.exports.hold(HOLDER, KEYS[:2], 5.0)] == [0, 0]


async def test_a_holder_that_never_renews_loses_its_hold(caplog):
    async with world() as w:
        w.put()
        await w.exports.hold(HOLDER, KEYS, 5.0)
        w.clock.advance(4.9)
        assert w.exports.expire(w.clock.now()) == []
        w.clock.advance(0.2)
        assert w.exports.expire(w.clock.now()) == [HOLDER]
        assert w.inventory.counts().active == 0
        assert w.exports.holds_ended == {ExportState.EXPIRED: 1}
        assert w.exports.holds_open == 0
        with pytest.raises(LeaseExpiredError):
            w.exports.check_readable(HOLDER, EPOCH, [])


async def test_holding_again_takes_the_place_of_the_earlier_hold():
    async with world() as w:
        w.put()
        await w.exports.hold(HOLDER, KEYS[:4], 5.0)
        w.clock.advance(4.0)
        again = await w.exports.hold(HOLDER, KEYS[2:6], 5.0)
        assert [r.key for r in again] == KEYS[2:6]
        assert w.inventory.counts().active == 4
        w.clock.advance(4.0)
        assert w.exports.expire(w.clock.now()) == [], "the new hold has its whole length"
        assert await w.exports.hold(HOLDER, [], 5.0) == []
        assert w.inventory.counts().active == 0


async def test_what_was_evicted_meanwhile_is_simply_missing():
    async with world() as w:
        w.put()
        w.inventory.release(w.inventory.allocate(8))  # four were free: the four oldest are evicted
        records = await w.exports.hold(HOLDER, KEYS, 5.0)
        assert len(records) == 8
        assert [KEYS[r.index] for r in records] == [r.key for r in records]


async def test_many_digests_are_computed_off_the_loop_and_a_cancelled_holder_holds_nothing(monkeypatch):
    monkeypatch.setattr(exports_module, "INLINE_BYTES_MAX", 0)
    async with world() as w:
        blocks = w.put()
        holding = asyncio.create_task(w.exports.hold(HOLDER, KEYS, 5.0))
        await asyncio.sleep(0)  # it has its references and waits for the thread
        assert w.inventory.counts().active == 12
        holding.cancel()
        await asyncio.wait([holding])
        assert holding.cancelled()
        assert w.inventory.counts().active == 0
        assert w.exports.holds_open == 0
        records = await w.exports.hold(HOLDER, KEYS, 5.0)
        assert [r.digest for r in records] == [digest_of(w.arena.bytes_view()[b]) for b in blocks]


@pytest.mark.parametrize("lease_s", [0.0, -1.0, float("nan"), float("inf")])
async def test_a_lease_is_a_length_of_time(lease_s):
    async with world() as w:
        w.put()
        with pytest.raises(InvalidRequestError, match="positive number"):
            await w.exports.hold(HOLDER, KEYS, lease_s)


async def test_holds_are_bounded(monkeypatch):
    monkeypatch.setattr(exports_module, "HOLDS_MAX", 2)
    async with world() as w:
        w.put()
        with pytest.raises(InvalidRequestError, match=str(HOLD_KEYS_MAX)):
            await w.exports.hold(HOLDER, [KEYS[0]] * (HOLD_KEYS_MAX + 1), 5.0)
        with pytest.raises(InvalidRequestError, match="16 bytes"):
            await w.exports.hold(HOLDER, [b"short"], 5.0)
        for n in range(2):
            await w.exports.hold(AttemptKey(f"hold/a/{n}", 1), KEYS[:1], 5.0)
        with pytest.raises(OverloadedError, match="drop some"):
            await w.exports.hold(HOLDER, KEYS[:1], 5.0)
        await w.exports.hold(AttemptKey("hold/a/0", 1), KEYS[:2], 5.0)  # in place of its own
        assert (await w.node.hold(AttemptKey("hold/a/1", 1), EPOCH, LAYOUT, KEYS, 1e9)).lease_s == HOLD_LEASE_MAX_S


async def test_a_hold_never_takes_the_name_of_a_hand_off():
    async with world() as w:
        w.put()
        w.exports.open(AttemptKey("request", 1), 5.0)
        with pytest.raises(InvalidRequestError, match="hand-off"):
            await w.exports.hold(AttemptKey("request", 1), KEYS, 5.0)
        assert not w.exports.drop(AttemptKey("request", 1))
        assert len(w.exports) == 1


@asynccontextmanager
async def served(transport, tmp_path):
    """A node behind its real servers, its own description, and a stub."""
    config = TransferConfig(transport=transport, shm_dir=str(tmp_path))
    arena = open_arena(config, "store-0", EPOCH, 16, LAYOUT.block_bytes)
    async with world(arena) as w:
        tcp = open_tcp(config, w.exports, "127.0.0.1:0")
        servicer = KvNodeServicer(w.exports, w.node)
        async with (
            serve("127.0.0.1:0", Registration("tandem.v1.Kv", kv_pb2_grpc.add_KvServicer_to_server, servicer)) as server,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            address = tcp.address if tcp else ""
            here = KvSource(
                "store-0",
                EPOCH,
                server.address,
                host_id(str(tmp_path)),
                arena.path,
                16,
                offered(arena, address),
                address,
            )
            w.node.source = lambda: here
            yield w, kv_pb2_grpc.KvStub(channel), config
        if tcp:
            await asyncio.to_thread(tcp.close)


def hold_request(keys=KEYS, **changes):
    fields = {"holder": key_to_pb(HOLDER), "epoch": EPOCH, "layout": layout_to_pb(LAYOUT), "keys": keys, "lease_s": 5.0}
    return kv_pb2.HoldRequest(**{**fields, **changes})


@pytest.mark.parametrize("transport", ["loopback", "shm", "tcp", "grpc"])
async def test_every_transport_pulls_what_is_held(transport, tmp_path):
    async with served(transport, tmp_path) as (w, stub, config):
        w.put()
        reply = await stub.Hold(hold_request(KEYS[::2]), timeout=10)
        records, source = [record_from_pb(r) for r in reply.records], source_from_pb(reply.source)
        assert [r.key for r in records] == KEYS[::2]
        assert reply.lease_s == 5.0
        hub, channels = LoopbackHub(), Channels()
        hub.register("store-0", EPOCH, w.arena)
        dest = HostArena(16, LAYOUT.block_bytes)
        transports = build_transports(config, dest.bytes_view(), channels, hub)
        try:
            result = await transports[transport].pull(source, HOLDER, records, range(6))
            assert result.bytes == 6 * LAYOUT.block_bytes
            for place, record in enumerate(records):
                assert np.array_equal(dest.bytes_view()[place], w.arena.bytes_view()[record.block_id])
            assert (await stub.Drop(kv_pb2.DropRequest(holder=key_to_pb(HOLDER), epoch=EPOCH), timeout=10)).found
            assert not (await stub.Drop(kv_pb2.DropRequest(holder=key_to_pb(HOLDER), epoch=EPOCH), timeout=10)).found
            if transport in ("tcp", "grpc"):  # the mapped ones look at generations alone: the bytes are still those
                with pytest.raises(LeaseExpiredError):
                    await transports[transport].pull(source, HOLDER, records, range(6))
        finally:
            for one in transports.values():
                await one.close()
            await channels.close()


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"epoch": EPOCH + 1}, UNAVAILABLE, "store-0 is of epoch 4"),
        (
            {"layout": layout_to_pb(replace(LAYOUT, fingerprint=b"\x02" * 16))},
            grpc.StatusCode.UNAVAILABLE,
            "fingerprint differs",
        ),
        ({"layout": layout_to_pb(replace(LAYOUT, dtype="bfloat16"))}, UNAVAILABLE, "dtype differs"),
        ({"layout": layout_to_pb(replace(LAYOUT, block_size=32))}, UNAVAILABLE, "block_size differs"),
        ({"lease_s": 0.0}, INVALID, "positive number"),
        ({"keys": [b"short"]}, INVALID, "16 bytes"),
    ],
)
async def test_refusals_say_why(changes, status, message, tmp_path):
    async with served("grpc", tmp_path) as (w, stub, _):
        w.put()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Hold(hold_request(**changes), timeout=10)
        assert caught.value.code() is status
        assert message in caught.value.details()
        assert w.exports.holds_open == 0


async def test_a_drop_for_another_epoch_is_refused(tmp_path):
    async with served("grpc", tmp_path) as (w, stub, _):
        w.put()
        await stub.Hold(hold_request(), timeout=10)
        with pytest.raises(grpc.aio.AioRpcError, match="epoch"):
            await stub.Drop(kv_pb2.DropRequest(holder=key_to_pb(HOLDER), epoch=EPOCH - 1), timeout=10)
        assert w.exports.holds_open == 1


async def test_stat_tells_what_is_here_and_how_often_it_was_asked_for(tmp_path):
    async with served("grpc", tmp_path) as (w, stub, _):
        w.put(KEYS[:5])
        await stub.Hold(hold_request(KEYS[:7]), timeout=10)
        stat = await stub.Stat(kv_pb2.StatRequest(), timeout=10)
        assert (stat.worker_id, stat.epoch, stat.policy, stat.leases_open) == ("store-0", EPOCH, "lru", 1)
        assert stat.layout == layout_to_pb(LAYOUT)
        (dram,) = stat.tiers
        assert (dram.blocks, dram.blocks_max, dram.bytes) == (5, 16, 5 * LAYOUT.block_bytes)
        assert (dram.hits, dram.misses) == (5, 2)
