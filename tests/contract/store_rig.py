"""A store node behind its real server, a worker that offers it blocks, and a reader that gets them by key."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from core.blocks import BlockKey, BlockRecord, KvLayout, KvSource, block_keys, root_key
from core.clock import SystemClock
from core.config import TransferConfig, load
from core.hostspec import HostSpec
from core.inventory import Inventory
from core.request import AttemptKey, WorkerRole
from core.service import Registration, serve
from core.wire import key_to_pb, layout_to_pb, record_from_pb, record_to_pb, source_from_pb, source_to_pb
from kvtransfer.arena import Arena, HostArena, host_id
from kvtransfer.channels import Channels
from kvtransfer.exports import Exports
from kvtransfer.plane import build_transports, offered, open_arena
from kvtransfer.service import KvServicer
from kvtransfer.store_feed import StoreFeed
from kvtransfer.store_node import StoreNode
from kvtransfer.store_service import StoreServicer
from tandem.v1 import kv_pb2, kv_pb2_grpc

LAYOUT = KvLayout(b"\x01" * 16, "float32", 2, 2, 8, 16)
STORE_EPOCH = 9
WORKER_EPOCH = 2
NOBODY = "127.0.0.1:1"
READER = AttemptKey("hold/reader/1", 1)


def keys_of(name: str, count: int, layout: KvLayout = LAYOUT) -> list[BlockKey]:
    return block_keys(root_key(layout.fingerprint, name.encode()), range(16 * count), 16)


def bytes_of(key: BlockKey, layout: KvLayout = LAYOUT) -> np.ndarray[Any, Any]:
    return np.random.default_rng(list(key)).integers(0, 256, layout.block_bytes, np.uint8)


def store_spec(shm_dir: Path, disk: Path | None = None, **overrides: Any) -> HostSpec:
    """16 blocks of memory; `overrides` are configuration paths with `__` for the dot."""
    dotted = {name.replace("__", "."): value for name, value in overrides.items()}
    small = {"store.dram_bytes": 2**20, "store.disk_bytes": 2**24, "transfer.shm_dir": str(shm_dir), "cluster.grace_s": 2.0}
    if disk is not None:
        small["store.disk_dir"] = str(disk)
    return HostSpec("store-0", WorkerRole.STORE, STORE_EPOCH, load(overrides={**small, **dotted}), controller=NOBODY)


@dataclass
class Worker:
    """A worker without an engine: blocks in an arena, leased to the name of an offer."""

    arena: Arena
    inventory: Inventory
    exports: Exports
    source: KvSource
    layout: KvLayout = LAYOUT

    def compute(self, keys: Sequence[BlockKey]) -> None:
        blocks = self.inventory.allocate(len(keys))
        for n, key in enumerate(keys):
            self.arena.bytes_view()[blocks[n]] = bytes_of(key, self.layout)
            blocks[n] = self.inventory.commit(blocks[n], key)
        self.inventory.release(blocks)

    async def records(self, holder: AttemptKey, keys: Sequence[BlockKey], lease_s: float = 10.0) -> list[BlockRecord]:
        return await self.exports.hold(holder, keys, lease_s)


@asynccontextmanager
async def worker_end(
    shm_dir: Path, blocks: int = 512, layout: KvLayout = LAYOUT, name: str = "prefill-0", **transfer: Any
) -> AsyncIterator[Worker]:
    config = TransferConfig.model_validate({"shm_dir": str(shm_dir), **transfer})
    arena = open_arena(config, name, WORKER_EPOCH, blocks, layout.block_bytes)
    inventory = Inventory(blocks, arena.generation_words())
    exports = Exports(WORKER_EPOCH, arena, inventory, SystemClock(), layout=layout)
    servicer = Registration("tandem.v1.Kv", kv_pb2_grpc.add_KvServicer_to_server, KvServicer(exports))
    async with serve("127.0.0.1:0", servicer, grace_s=0.0) as server:
        source = KvSource(name, WORKER_EPOCH, server.address, host_id(str(shm_dir)), arena.path, blocks, offered(arena))
        yield Worker(arena, inventory, exports, source, layout)
        await exports.close()
    arena.close()


def outcome(reply: Any) -> tuple[int, int, int]:
    return reply.taken, reply.known, reply.refused


class Client:
    """The Kv service of a store, in our own words."""

    def __init__(self, stub: kv_pb2_grpc.KvStub, epoch: int = STORE_EPOCH, layout: KvLayout = LAYOUT) -> None:
        self.stub = stub
        self.epoch = epoch
        self.layout = layout
        self._offers = 0

    async def offer(self, worker: Worker, keys: Sequence[BlockKey], **changes: Any) -> Any:
        """Computes the blocks, leases them, offers them, and lets go."""
        self._offers += 1
        holder = AttemptKey(f"hold/offer/{self._offers}", 1)
        worker.compute(keys)
        try:
            return await self.offer_records(worker, holder, await worker.records(holder, keys), **changes)
        finally:
            worker.exports.drop(holder)

    async def offer_records(self, worker: Worker, holder: AttemptKey, blocks: Sequence[BlockRecord], **changes: Any) -> Any:
        fields = {
            "holder": key_to_pb(holder),
            "epoch": self.epoch,
            "layout": layout_to_pb(worker.layout),
            "source": source_to_pb(worker.source),
            "records": [record_to_pb(record) for record in blocks],
        }
        return await self.stub.Offer(kv_pb2.OfferRequest(**{**fields, **changes}), timeout=20)

    async def hold(self, keys: Sequence[BlockKey], holder: AttemptKey = READER, lease_s: float = 10.0, **changes: Any) -> Any:
        fields = {"holder": key_to_pb(holder), "epoch": self.epoch, "layout": layout_to_pb(self.layout), "lease_s": lease_s}
        return await self.stub.Hold(kv_pb2.HoldRequest(**{**fields, "keys": keys, **changes}), timeout=20)

    async def drop(self, holder: AttemptKey = READER) -> bool:
        return (await self.stub.Drop(kv_pb2.DropRequest(holder=key_to_pb(holder), epoch=self.epoch), timeout=20)).found

    async def stat(self) -> dict[int, Any]:
        stat = await self.stub.Stat(kv_pb2.StatRequest(), timeout=20)
        return {tier.tier: tier for tier in stat.tiers}

    async def read(
        self, keys: Sequence[BlockKey], holder: AttemptKey = READER, transport: str = "grpc"
    ) -> dict[BlockKey, bytes]:
        """Holds, pulls and drops: the bytes of what was there."""
        reply = await self.hold(keys, holder)
        records = [record_from_pb(record) for record in reply.records]
        if not records:
            return {}
        channels, dest = Channels(), HostArena(max(1, len(records)), self.layout.block_bytes)
        transports = build_transports(TransferConfig(transport=transport), dest.bytes_view(), channels)
        try:
            await transports[transport].pull(source_from_pb(reply.source), holder, records, range(len(records)))
            return {record.key: dest.bytes_view()[n].tobytes() for n, record in enumerate(records)}
        finally:
            await self.drop(holder)
            for one in transports.values():
                await one.close()
            await channels.close()


@dataclass
class Store:
    node: StoreNode
    client: Client
    feed: StoreFeed


@asynccontextmanager
async def store_end(spec: HostSpec) -> AsyncIterator[Store]:
    """In this process, with its server and its ticking; checked for leaks at the end."""
    addresses: list[str] = []
    node = StoreNode(spec, SystemClock(), host_id(spec.config.transfer.shm_dir), lambda: addresses[0])
    feed = StoreFeed(node, SystemClock())
    servicer = StoreServicer(node, feed)
    async with (
        serve(
            "127.0.0.1:0", Registration("tandem.v1.Kv", kv_pb2_grpc.add_KvServicer_to_server, servicer), grace_s=0.0
        ) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        addresses.append(server.address)
        await node.start()
        ticking = asyncio.create_task(_tick(node, feed), name="tick")
        try:
            yield Store(node, Client(kv_pb2_grpc.KvStub(channel), spec.epoch), feed)
        finally:
            ticking.cancel()
            inventory = node.plane.inventory if node.plane is not None else None
            await node.close()
    if inventory is not None:
        inventory.check()
        assert not inventory.leases_open()
        assert not inventory.counts().active - inventory.pinned(), "the store leaked a block"


async def _tick(node: StoreNode, feed: StoreFeed) -> None:
    while True:
        node.tick()
        feed.poke()
        await asyncio.sleep(0.02)
