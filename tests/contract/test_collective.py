"""collective through the suite that every transport owes, over gloo, with helper processes on both sides."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import count

import pytest
import pytest_asyncio
from transport_suite import EPOCH, KEY, Pair, TransportSuite, new_exports, source_of, until

from core.inventory import Inventory
from core.service import Registration, serve
from kvtransfer.channels import Channels
from kvtransfer.collective import GROUPS_PER_SOURCE, CollectiveTransport
from kvtransfer.collective_helper import Helper
from kvtransfer.collective_service import CollectiveServicer
from kvtransfer.shared_arena import SharedArena
from tandem.v1.kv_pb2_grpc import add_KvCollectiveServicer_to_server

NUMBERS = count()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return str(tmp_path_factory.mktemp("arenas"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def helpers(directory):
    """The source's and the destination's. Shared by all tests here, because each start imports torch."""
    pair = [Helper("gloo", "127.0.0.1", directory, restart_s=0.0) for _ in range(2)]
    async with asyncio.timeout(100):
        await asyncio.gather(*(helper.backend() for helper in pair))
    yield pair
    for helper in pair:
        await helper.close()


@pytest.mark.asyncio(loop_scope="module")
class TestCollective(TransportSuite):
    @pytest.fixture(autouse=True)
    def _helpers(self, helpers, directory):
        self.source_helper, self.dest_helper = helpers
        self.directory = directory

    def arena(self, name, num_blocks, block_bytes):
        """A new file each: the helpers outlive the arenas."""
        return SharedArena(self.directory, f"{name}{next(NUMBERS)}", EPOCH, num_blocks, block_bytes)

    @asynccontextmanager
    async def pair(self, num_blocks=64, block_bytes=4096, *, timeout_s=20.0, digest=True):
        async with asyncio.timeout(100):  # one that an earlier test killed imports torch again
            await asyncio.gather(self.source_helper.backend(), self.dest_helper.backend())
        arena, dest = self.arena("source", num_blocks, block_bytes), self.arena("dest", num_blocks, block_bytes)
        inventory = Inventory(num_blocks, arena.generation_words())
        exports = new_exports(arena, inventory)
        exports.open(KEY, 60.0)
        self.channels = Channels()
        servicer = CollectiveServicer(exports, self.source_helper)
        registration = Registration("tandem.v1.KvCollective", add_KvCollectiveServicer_to_server, servicer)
        self.server = serve("127.0.0.1:0", registration, grace_s=0.0)
        async with self.server:
            self.other = transport = CollectiveTransport(
                dest, self.channels, self.dest_helper, digest=digest, timeout_s=timeout_s
            )
            yield Pair(arena, inventory, exports, source_of(arena, self.server.address), dest.bytes_view(), transport)
            for end in (transport, self.other):
                await end.close()
            await self.channels.close()
            await exports.close()
        arena.close()
        dest.close()

    async def vanish(self, pair):
        """Its process with all its sockets, the helper's among them."""
        self.source_helper.kill()
        await until(lambda: self.source_helper._process.ended)
        await self.server._server.stop(0)

    @asynccontextmanager
    async def stalled(self, pair):
        """A peer that accepts connections and never says a word."""
        writers = []
        quiet = await asyncio.start_server(lambda reader, writer: writers.append(writer), "127.0.0.1", 0)
        pair.source = replace(pair.source, grpc_address=f"127.0.0.1:{quiet.sockets[0].getsockname()[1]}")
        try:
            yield
        finally:
            await self.channels.close()
            quiet.close()
            for writer in writers:
                writer.close()
            await asyncio.gather(*(writer.wait_closed() for writer in writers), return_exceptions=True)

    async def other_size(self, pair, block_bytes):
        self.other = CollectiveTransport(
            self.arena("other", 8, block_bytes), self.channels, self.dest_helper, digest=True, timeout_s=5.0
        )
        return self.other

    async def test_a_group_is_kept_and_dropped(self):
        async with self.pair() as pair:
            records = pair.offer(16)
            made = self.dest_helper.stats.groups_made
            for _ in range(3):
                await pair.pull(records, list(range(16)))
            assert self.dest_helper.stats.groups_made == made + 1
            await asyncio.gather(*(pair.pull(records[i : i + 1], [i]) for i in range(16)))
            assert self.dest_helper.stats.groups_made <= made + GROUPS_PER_SOURCE
            pair.transport.forget(pair.source)
            await until(lambda: not self.dest_helper._process.groups)
            await pair.pull(records[:1], [0])
