"""Each transport through the suite that all of them owe."""

from __future__ import annotations

import asyncio
import threading
from contextlib import asynccontextmanager

import numpy as np
import pytest
from transport_suite import KEY, Pair, TransportSuite, new_exports, source_of

from core.inventory import Inventory
from core.service import Registration, serve
from kvtransfer.arena import Arena, HostArena
from kvtransfer.channels import Channels
from kvtransfer.copier import Copier
from kvtransfer.grpc_transport import GrpcTransport
from kvtransfer.loopback import LoopbackHub, LoopbackTransport
from kvtransfer.service import KvServicer
from kvtransfer.shared_arena import SharedArena
from kvtransfer.shm import ShmTransport
from tandem.v1.kv_pb2_grpc import add_KvServicer_to_server


def ends(arena: Arena, block_bytes: int) -> tuple[Inventory, np.ndarray]:
    return Inventory(arena.num_blocks, arena.generation_words()), np.zeros((arena.num_blocks, block_bytes), np.uint8)


class Mapped(TransportSuite):
    """Transports that copy from memory they can see."""

    @asynccontextmanager
    async def stalled(self, pair):
        release = threading.Event()
        copier: Copier = pair.transport._copier
        stuck = [copier._pool.submit(release.wait, 20.0) for _ in range(2)]
        try:
            yield
        finally:
            release.set()
            await asyncio.gather(*map(asyncio.wrap_future, stuck))


class TestLoopback(Mapped):
    @asynccontextmanager
    async def pair(self, num_blocks=64, block_bytes=4096, *, timeout_s=20.0, digest=True):
        arena = HostArena(num_blocks, block_bytes)
        inventory, dest = ends(arena, block_bytes)
        self.hub = LoopbackHub()
        source = source_of(arena)
        self.hub.register(source.worker_id, source.epoch, arena)
        transport = LoopbackTransport(Copier(dest, digest=digest, timeout_s=timeout_s), self.hub)
        exports = new_exports(arena, inventory)
        yield Pair(arena, inventory, exports, source, dest, transport)
        await transport.close()
        await exports.close()

    async def vanish(self, pair):
        self.hub.unregister(pair.source.worker_id, pair.source.epoch)

    async def other_size(self, pair, block_bytes):
        return LoopbackTransport(Copier(np.zeros((8, block_bytes), np.uint8), digest=True, timeout_s=1.0), self.hub)


class TestShm(Mapped):
    @pytest.fixture(autouse=True)
    def _directory(self, tmp_path):
        self.directory = str(tmp_path)

    @asynccontextmanager
    async def pair(self, num_blocks=64, block_bytes=4096, *, timeout_s=20.0, digest=True):
        arena = SharedArena(self.directory, "prefill-0", 7, num_blocks, block_bytes)
        inventory, dest = ends(arena, block_bytes)
        transport = ShmTransport(Copier(dest, digest=digest, timeout_s=timeout_s), self.directory)
        exports = new_exports(arena, inventory)
        yield Pair(arena, inventory, exports, source_of(arena), dest, transport)
        await transport.close()
        await exports.close()
        arena.close()

    async def vanish(self, pair):
        pair.arena.close()
        pair.transport.forget(pair.source)

    async def other_size(self, pair, block_bytes):
        copier = Copier(np.zeros((8, block_bytes), np.uint8), digest=True, timeout_s=1.0)
        return ShmTransport(copier, self.directory)

    async def test_a_mapping_is_kept_and_dropped(self):
        async with self.pair() as pair:
            records = pair.offer(2)
            await pair.pull(records, [0, 1])
            (mapped,) = pair.transport._mapped.values()
            await pair.pull(records, [2, 3])
            assert list(pair.transport._mapped.values()) == [mapped]
            pair.transport.forget(pair.source)
            assert not pair.transport._mapped

    async def test_a_mapping_of_a_removed_file_is_dropped_when_the_next_source_is_mapped(self):
        async with self.pair() as pair:
            await pair.pull(pair.offer(1), [0])
            pair.arena.close()
            async with self.pair() as later:
                await pair.transport.pull(later.source, KEY, later.offer(1), [0])
            assert len(pair.transport._mapped) == 1


class TestGrpc(TransportSuite):
    @asynccontextmanager
    async def pair(self, num_blocks=64, block_bytes=4096, *, timeout_s=20.0, digest=True):
        arena = HostArena(num_blocks, block_bytes)
        inventory, dest = ends(arena, block_bytes)
        exports = new_exports(arena, inventory)
        exports.open(KEY, 60.0)
        self.channels = Channels()
        self.server = serve(
            "127.0.0.1:0", Registration("tandem.v1.Kv", add_KvServicer_to_server, KvServicer(exports)), grace_s=0.0
        )
        async with self.server:
            transport = GrpcTransport(dest, self.channels, digest=digest, timeout_s=timeout_s)
            yield Pair(arena, inventory, exports, source_of(arena, self.server.address), dest, transport)
            await transport.close()
            await self.channels.close()
            await exports.close()

    async def vanish(self, pair):
        await self.server._server.stop(0)

    @asynccontextmanager
    async def stalled(self, pair):
        """A peer that accepts connections and never says a word."""
        writers = []
        quiet = await asyncio.start_server(lambda reader, writer: writers.append(writer), "127.0.0.1", 0)
        port = quiet.sockets[0].getsockname()[1]
        pair.source = source_of(pair.arena, f"127.0.0.1:{port}")
        try:
            yield
        finally:
            await self.channels.close()
            quiet.close()
            for writer in writers:
                writer.close()
            await asyncio.gather(*(writer.wait_closed() for writer in writers), return_exceptions=True)

    async def other_size(self, pair, block_bytes):
        return GrpcTransport(np.zeros((8, block_bytes), np.uint8), self.channels, digest=True, timeout_s=1.0)
