"""Both ends of a hand-off in one process, over a real gRPC server: what the tests of puller and exports drive."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import numpy as np

from core.blocks import BlockRecord, Closing, KvLayout, KvSource, KvTicket, block_keys, blocks_for, root_key
from core.clock import SystemClock
from core.config import TransferConfig
from core.inventory import Inventory
from core.request import AttemptKey
from core.service import GrpcServer, Registration, serve
from kvtransfer.arena import Arena, HostArena, host_id
from kvtransfer.channels import Channels
from kvtransfer.exports import Exports
from kvtransfer.fetch import Fetcher
from kvtransfer.loopback import LoopbackHub
from kvtransfer.plane import build_fetcher, offered
from kvtransfer.puller import IngestPlan, Puller
from kvtransfer.service import KvServicer
from kvtransfer.shared_arena import SharedArena
from tandem.v1.kv_pb2_grpc import add_KvServicer_to_server

LAYOUT = KvLayout(b"\x01" * 16, "float32", 2, 2, 8, 16)
EPOCH = 3
NUM_BLOCKS = 64


@dataclass
class Source:
    """A prefill worker without an engine: the test says what has been computed."""

    arena: Arena
    inventory: Inventory
    exports: Exports
    server: GrpcServer
    lease_s: float
    offered: tuple[str, ...]
    host_id: str

    def ticket(self, key: AttemptKey) -> KvTicket:
        source = KvSource(
            "prefill-0", EPOCH, self.server.address, self.host_id, self.arena.path, self.arena.num_blocks, self.offered
        )
        return KvTicket(key, LAYOUT, source, self.lease_s)

    def open(self, key: AttemptKey) -> KvTicket:
        self.exports.open(key, self.lease_s)
        return self.ticket(key)

    def compute(self, key: AttemptKey, tokens: list[int], first: int, last: int) -> list[BlockRecord]:
        """Fills, commits and leases blocks `first` to `last - 1` of the request; announces nothing."""
        keys = block_keys(root_key(LAYOUT.fingerprint), tokens, LAYOUT.block_size)
        records = []
        for index in range(first, last):
            (block,) = self.inventory.allocate(1)
            self.arena.bytes_view()[block] = np.random.default_rng(tokens[: (index + 1) * 16]).integers(
                0, 256, self.arena.block_bytes, np.uint8
            )
            full = index < len(keys)
            if full:
                block = self.inventory.commit(block, keys[index])
            self.inventory.lease(key, [block], SystemClock().now() + self.lease_s)
            self.inventory.release([block])
            filled = LAYOUT.block_size if full else len(tokens) % LAYOUT.block_size
            generation = self.inventory.generation(block)
            records.append(BlockRecord(index, keys[index] if full else b"", block, generation, 0, filled))
        return records

    def announce(self, key: AttemptKey, tokens: list[int], first: int, last: int) -> list[BlockRecord]:
        records = self.compute(key, tokens, first, last)
        self.exports.announce(key, records)
        return records

    def close(self, key: AttemptKey, tokens: list[int]) -> None:
        full = len(tokens) // LAYOUT.block_size
        partial = self.compute(key, tokens, full, blocks_for(len(tokens), LAYOUT.block_size))
        self.exports.close_(key, Closing(len(tokens), (42,), False, 0.5), partial[0] if partial else None)


@dataclass
class Destination:
    """A decode worker without an engine."""

    arena: Arena
    inventory: Inventory
    puller: Puller
    fetcher: Fetcher

    def plan(self, tokens: list[int]) -> IngestPlan:
        """Blocks for the tokens: resident ones first, then fresh ones."""
        keys = block_keys(root_key(LAYOUT.fingerprint), tokens, LAYOUT.block_size)
        resident = self.inventory.match(keys)
        fresh = self.inventory.allocate(blocks_for(len(tokens), LAYOUT.block_size) - len(resident))
        return IngestPlan(keys, len(tokens), resident + fresh, frozenset(range(len(resident))))

    def expect(self, plan: IngestPlan, tokens: list[int]) -> None:
        """Every block is what the source computed for these tokens, and the full ones are findable."""
        for index, block in enumerate(plan.blocks):
            bytes_of = np.random.default_rng(tokens[: (index + 1) * 16]).integers(0, 256, self.arena.block_bytes, np.uint8)
            assert np.array_equal(self.arena.bytes_view()[block], bytes_of), f"block {index}"
            expected_key = plan.keys[index] if index < len(plan.keys) else None
            assert self.inventory.key_of(block) == expected_key

    def expect_all_free(self, plan: IngestPlan) -> None:
        self.inventory.release(plan.blocks)
        self.inventory.check()
        assert self.inventory.counts().active == 0


@asynccontextmanager
async def source_end(lease_s: float = 10.0, shm_dir: str = "") -> AsyncIterator[Source]:
    shape = (NUM_BLOCKS, LAYOUT.block_bytes)
    arena = SharedArena(shm_dir, "prefill-0", EPOCH, *shape) if shm_dir else HostArena(*shape)
    inventory = Inventory(NUM_BLOCKS, arena.generation_words())
    exports = Exports(EPOCH, arena, inventory, SystemClock(), layout=LAYOUT)
    servicer = Registration("tandem.v1.Kv", add_KvServicer_to_server, KvServicer(exports))
    async with serve("127.0.0.1:0", servicer, grace_s=0.0) as server:
        sweeping = asyncio.create_task(_sweep(exports), name="sweep")
        yield Source(arena, inventory, exports, server, lease_s, offered(arena), host_id(shm_dir))
        sweeping.cancel()
        await exports.close()
    arena.close()


async def _sweep(exports: Exports) -> None:
    while True:
        exports.expire(SystemClock().now())
        await asyncio.sleep(0.02)


@asynccontextmanager
async def destination_end(hub: LoopbackHub | None = None, **config: object) -> AsyncIterator[Destination]:
    settings = TransferConfig.model_validate({"lease_margin_s": 0.1, **config})
    arena = HostArena(NUM_BLOCKS, LAYOUT.block_bytes)
    inventory = Inventory(NUM_BLOCKS, arena.generation_words())
    channels = Channels()
    clock, here = SystemClock(), host_id(settings.shm_dir)
    fetcher = build_fetcher(settings, arena.bytes_view(), LAYOUT, channels, clock, here, hub or LoopbackHub())
    puller = Puller(LAYOUT, inventory, fetcher, channels, settings, clock, puller_id="decode-0")
    yield Destination(arena, inventory, puller, fetcher)
    await puller.close()
    await fetcher.close()
    await channels.close()


class Line:
    """A TCP relay between the two ends whose connections a test can break, or freeze."""

    def __init__(self, target: str) -> None:
        self._target = target.rpartition(":")
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._flows = asyncio.Event()
        self._flows.set()
        self.connections = 0

    async def __aenter__(self) -> str:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.cut()
        self._flows.set()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    def freeze(self) -> None:
        self._flows.clear()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        far_reader, far_writer = await asyncio.open_connection(self._target[0], int(self._target[2]))
        self._writers += [writer, far_writer]
        for ends in ((reader, far_writer), (far_reader, writer)):
            task = asyncio.create_task(self._relay(*ends))
            self._tasks.add(task)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                await self._flows.wait()
                writer.write(data)
                await writer.drain()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
