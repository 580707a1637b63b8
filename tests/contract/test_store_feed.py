"""A store tells routers what it has, in memory and on disk, and what changes; streams end when they should."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from store_rig import LAYOUT, STORE_EPOCH, keys_of, store_end, store_spec, worker_end
from transport_suite import until

from core.blocks import KEY_BYTES, KvLayout
from core.wire import changes_from_pb
from kvtransfer import store_feed
from tandem.v1 import kv_pb2

DEADLINE_S = 20.0


class Listener:
    """A router's end of one stream: what it would believe."""

    def __init__(self, store: Any, epoch: int = STORE_EPOCH, stream: int = 5) -> None:
        self.call = store.client.stub.Changes(kv_pb2.ChangesRequest(epoch=epoch, stream=stream))
        self.stream = stream
        self.sequence = 0
        self.dram: set[bytes] = set()
        self.disk: set[bytes] = set()

    async def until(self, check: Any) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not check(self):
                changes = changes_from_pb(await self.call.read())
                assert (changes.stream, changes.sequence) == (self.stream, self.sequence + 1)
                self.sequence += 1
                self.dram = self.dram - _keys(changes.removed_dram) | _keys(changes.added_dram)
                self.disk = self.disk - _keys(changes.removed_disk) | _keys(changes.added_disk)


def _keys(packed: bytes) -> set[bytes]:
    return {packed[at : at + KEY_BYTES] for at in range(0, len(packed), KEY_BYTES)}


async def test_what_is_there_and_what_comes_and_goes(tmp_path):
    async with worker_end(tmp_path) as worker, store_end(store_spec(tmp_path, tmp_path / "disk")) as store:
        early = Listener(store)  # before the store has seen a block
        first, second = keys_of("a", 100), keys_of("b", 200)
        await store.client.offer(worker, first)
        await early.until(lambda heard: heard.dram == set(first) and heard.disk == set(first))
        late = Listener(store, stream=6)
        await late.until(lambda heard: heard.sequence and heard.dram == set(first) and heard.disk == set(first))
        await store.client.offer(worker, second)
        total = store.node.plane.inventory.counts().total
        assert total < 300, "so that memory forgets some"
        for listener in (early, late):
            await listener.until(lambda heard: len(heard.dram) == total and heard.disk == {*first, *second})
        await store.node.evict(None)
        for listener in (early, late):
            await listener.until(lambda heard: not heard.dram and not heard.disk)
            listener.call.cancel()
        await until(lambda: not len(store.feed))
        assert len(store.node.plane.inventory._logs) == 1, "nobody pays for listeners that are gone"


async def test_a_stream_ends_with_the_blocks_it_is_about(tmp_path):
    """A store that took up another model's blocks from its disk yields to the first offer: the stream of the old ones ends."""
    spec, other = store_spec(tmp_path, tmp_path / "disk"), KvLayout(b"\x02" * 16, *LAYOUT_REST)
    async with worker_end(tmp_path) as worker, store_end(spec) as store:
        await store.client.offer(worker, keys_of("a", 3))
        await until(lambda: len(store.node.plane.disk.tier.keys()) == 3)
    async with worker_end(tmp_path, layout=other) as worker, store_end(spec) as store:
        listener = Listener(store)
        await listener.until(lambda heard: len(heard.disk) == 3)
        await store.client.offer(worker, keys_of("a", 2, other))
        async with asyncio.timeout(DEADLINE_S):
            assert await listener.call.read() is grpc.aio.EOF
        again = Listener(store)
        await again.until(lambda heard: heard.dram == set(keys_of("a", 2, other)))
        again.call.cancel()
        await until(lambda: not len(store.feed))


LAYOUT_REST = (LAYOUT.dtype, LAYOUT.num_layers, LAYOUT.kv_heads, LAYOUT.head_dim, LAYOUT.block_size)


async def test_refusals(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store_feed, "LISTENERS_MAX", 1)
    async with store_end(store_spec(tmp_path)) as store:
        with pytest.raises(grpc.aio.AioRpcError, match="the call is for epoch"):
            await Listener(store, epoch=STORE_EPOCH - 1).call.read()
        first = Listener(store)
        await until(lambda: len(store.feed) == 1)
        with pytest.raises(grpc.aio.AioRpcError, match="it serves no more"):
            await Listener(store).call.read()
        first.call.cancel()
        await until(lambda: not len(store.feed))
