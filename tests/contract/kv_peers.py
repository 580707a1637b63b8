"""KV nodes of one process with their real arenas and servers, and the worker that makes blocks of theirs resident."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import numpy as np

from core.blocks import BlockKey, KvLayout, KvSource, block_keys, root_key
from core.clock import SystemClock
from core.config import TransferConfig
from core.inventory import Inventory
from core.request import AttemptKey, WorkerRole
from core.service import Registration, serve
from kvtransfer.arena import Arena, host_id
from kvtransfer.channels import Channels
from kvtransfer.directory import Directory, NodeRecord, Tier
from kvtransfer.exports import Exports
from kvtransfer.fetch import Fetcher
from kvtransfer.flight import Ground, ResidentStats
from kvtransfer.hold_client import HoldClient
from kvtransfer.kv_node import Held, KvNode
from kvtransfer.kv_service import KvNodeServicer
from kvtransfer.local_directory import ClockedDirectory, LocalDirectory
from kvtransfer.plane import build_transports, offered, open_arena, open_tcp
from kvtransfer.residency import Here
from kvtransfer.resident import Resident
from tandem.v1 import kv_pb2_grpc

LAYOUT = KvLayout(b"\x01" * 16, "float32", 2, 2, 8, 16)
EPOCH = 4
NUM_BLOCKS = 64
KEYS = block_keys(root_key(LAYOUT.fingerprint), range(16 * 200), LAYOUT.block_size)


def bytes_of(key: BlockKey) -> np.ndarray:
    return np.random.default_rng(list(key)).integers(0, 256, LAYOUT.block_bytes, np.uint8)


class WatchedNode(KvNode):
    """Counts who asked, lets a test wait for a question, and hold the answer back until `gate` is set."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.asked = 0
        self.arrived = asyncio.Event()
        self.gate: asyncio.Event | None = None

    async def hold(self, holder: AttemptKey, epoch: int, layout: KvLayout, keys: Sequence[BlockKey], lease_s: float) -> Held:
        self.asked += 1
        self.arrived.set()
        if self.gate is not None:
            await self.gate.wait()
        return await super().hold(holder, epoch, layout, keys, lease_s)


@dataclass
class Peer:
    """Another node of the plane. `put` gives it blocks, `say` tells the directory of them."""

    arena: Arena
    inventory: Inventory
    exports: Exports
    node: WatchedNode
    record: NodeRecord
    directory: Directory

    async def put(self, keys: Sequence[BlockKey], tier: Tier = Tier.DRAM) -> list[int]:
        blocks = self.inventory.allocate(len(keys))
        for block, key in zip(blocks, keys, strict=True):
            self.arena.bytes_view()[block] = bytes_of(key)
            self.inventory.commit(block, key)
        self.inventory.release(blocks)
        await self.say(keys, tier)
        return blocks

    async def say(self, keys: Sequence[BlockKey], tier: Tier = Tier.DRAM) -> None:
        source = self.record.source
        await self.directory.announce(source.worker_id, source.epoch, [(key, tier) for key in keys], [])

    def settled(self) -> bool:
        return not self.inventory.leases_open() and not self.inventory.counts().active


@dataclass
class Worker:
    """The one who wants blocks."""

    arena: Arena
    inventory: Inventory
    fetcher: Fetcher
    resident: Resident
    stats: ResidentStats
    compute_block_s: list[float] = field(default_factory=lambda: [1.0])

    async def ensure(self, keys: Sequence[BlockKey], deadline_s: float = 10.0) -> int:
        """How many blocks of `keys` are here afterwards; their bytes are checked and their references given back."""
        blocks = await self.resident.ensure(keys, b"", deadline_s)
        for block, key in zip(blocks, keys, strict=False):
            assert np.array_equal(self.arena.bytes_view()[block], bytes_of(key)), "a wrong byte"
        assert self.inventory.match(keys) == blocks
        self.inventory.release(blocks)
        self.inventory.release(blocks)
        return len(blocks)


def directory() -> ClockedDirectory:
    return ClockedDirectory(LocalDirectory(), SystemClock())


@asynccontextmanager
async def peer(
    name: str,
    directory: Directory,
    shm_dir: object,
    *,
    transport: str = "shm",
    role: WorkerRole = WorkerRole.PREFILL,
    layout: KvLayout = LAYOUT,
    epoch: int = EPOCH,
) -> AsyncIterator[Peer]:
    config = TransferConfig(transport=transport, shm_dir=str(shm_dir))
    arena = open_arena(config, name, epoch, NUM_BLOCKS, layout.block_bytes)
    inventory = Inventory(NUM_BLOCKS, arena.generation_words())
    exports = Exports(epoch, arena, inventory, SystemClock(), layout=layout)
    tcp = open_tcp(config, exports, "127.0.0.1:0")
    address = tcp.address if tcp else ""
    node = WatchedNode(exports, inventory, layout, lambda: here, role)
    servicer = Registration("tandem.v1.Kv", kv_pb2_grpc.add_KvServicer_to_server, KvNodeServicer(exports, node))
    async with serve("127.0.0.1:0", servicer, grace_s=0.0) as server:
        here = KvSource(
            name, epoch, server.address, host_id(str(shm_dir)), arena.path, NUM_BLOCKS, offered(arena, address), address
        )
        record = NodeRecord(here, layout, role)
        await directory.join(record, 60.0)
        yield Peer(arena, inventory, exports, node, record, directory)
    if tcp:
        await asyncio.to_thread(tcp.close)
    await exports.close()
    arena.close()
    inventory.check()
    assert not inventory.counts().active, "a block is held by nobody who could give it back"


@asynccontextmanager
async def worker(
    directory: Directory, shm_dir: object, *, transport: str = "shm", num_blocks: int = NUM_BLOCKS
) -> AsyncIterator[Worker]:
    config = TransferConfig(transport=transport, shm_dir=str(shm_dir))
    arena = open_arena(config, "here", EPOCH, num_blocks, LAYOUT.block_bytes)
    inventory = Inventory(num_blocks, arena.generation_words())
    channels, clock = Channels(), SystemClock()
    transports = build_transports(config, arena.bytes_view(), channels)
    fetcher = Fetcher(transports, config.transport, clock, host_id=host_id(str(shm_dir)))
    compute_block_s = [1.0]
    ground = Ground(
        Here("here", fetcher.host_id, LAYOUT),
        inventory,
        directory,
        fetcher,
        HoldClient(channels, LAYOUT, "here", EPOCH),
        clock,
        lambda: compute_block_s[0],
    )
    resident = Resident(ground, lambda: True)
    yield Worker(arena, inventory, fetcher, resident, ground.stats, compute_block_s)
    await resident.close()
    await fetcher.close()
    await channels.close()
    arena.close()
    inventory.check()
    assert not inventory.counts().active, "a block is held by nobody who could give it back"
