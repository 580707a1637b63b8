"""What every transport must do. A test class inherits `TransportSuite` and says how to make a pair of ends.

Importable by other rooms' tests and by transports to come: `from transport_suite import Pair, TransportSuite`.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from core.blocks import BlockRecord, KvSource
from core.clock import SystemClock
from core.errors import DigestMismatchError, StaleEpochError, TransferError
from core.inventory import Inventory
from core.request import AttemptKey
from kvtransfer.arena import Arena, Blocks
from kvtransfer.codec import digest_of
from kvtransfer.exports import Exports
from kvtransfer.transport import BlocksGoneError, Transport

KEY = AttemptKey("request", 1)
EPOCH = 7
UNTOUCHED = 0xA5


@dataclass
class Pair:
    """A source with an arena of its own and a transport that can pull from it into `dest`."""

    arena: Arena
    inventory: Inventory
    exports: Exports
    source: KvSource
    dest: Blocks
    transport: Transport
    rng: random.Random = field(default_factory=lambda: random.Random(11))
    bytes_rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(11))

    def offer(self, count: int, *, scattered: bool = False) -> list[BlockRecord]:
        """`count` blocks of random bytes, held and announced under KEY."""
        blocks = self.inventory.allocate(count)
        if scattered:
            self.rng.shuffle(blocks)
        records = [self.fill(index, block) for index, block in enumerate(blocks)]
        self.announce(records)
        return records

    def fill(self, index: int, block: int) -> BlockRecord:
        span = self.arena.bytes_view()[block]
        span[:] = np.frombuffer(self.bytes_rng.bytes(span.size), np.uint8)
        return BlockRecord(index, bytes(16), block, self.inventory.generation(block), digest_of(span), 16)

    def announce(self, records: Sequence[BlockRecord]) -> None:
        with contextlib.suppress(TransferError):
            self.exports.open(KEY, lease_s=60.0)
        self.exports.announce(KEY, records)

    def source_bytes(self, records: Sequence[BlockRecord]) -> Blocks:
        return self.arena.bytes_view()[[record.block_id for record in records]].copy()

    def hand_out_again(self, record: BlockRecord) -> None:
        """The block is freed, taken by another request and overwritten."""
        self.inventory.release([record.block_id])
        taken = self.inventory.allocate(1)
        assert taken == [record.block_id], "the block freed last is handed out first"
        self.arena.bytes_view()[record.block_id] = 0

    async def pull(self, records: Sequence[BlockRecord], dest_blocks: Sequence[int]) -> int:
        result = await self.transport.pull(self.source, KEY, records, dest_blocks)
        assert result.seconds >= 0
        return result.bytes


class TransportSuite(ABC):
    @abstractmethod
    def pair(
        self, num_blocks: int = 64, block_bytes: int = 4096, *, timeout_s: float = 20.0, digest: bool = True
    ) -> contextlib.AbstractAsyncContextManager[Pair]: ...

    @abstractmethod
    async def vanish(self, pair: Pair) -> None:
        """The source's worker is gone."""

    @abstractmethod
    def stalled(self, pair: Pair) -> contextlib.AbstractAsyncContextManager[None]:
        """The source, or what copies from it, makes no progress inside the block."""

    # -- moving bytes ----------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("count", [0, 1, 2, 33])
    async def test_moves_what_was_asked_and_nothing_else(self, count):
        async with self.pair() as pair:
            records = pair.offer(count)
            pair.dest[:] = UNTOUCHED
            dest_blocks = list(range(5, 5 + count))
            assert await pair.pull(records, dest_blocks) == count * pair.arena.block_bytes
            expect_only(pair, records, dest_blocks)

    async def test_scattered_blocks_each_reach_their_own_place(self):
        async with self.pair() as pair:
            records = pair.offer(40, scattered=True)
            pair.dest[:] = UNTOUCHED
            dest_blocks = pair.rng.sample(range(64), 40)
            await pair.pull(records, dest_blocks)
            expect_only(pair, records, dest_blocks)

    async def test_ten_thousand_blocks(self):
        async with self.pair(10_000, 64) as pair:
            records = pair.offer(10_000, scattered=True)
            dest_blocks = list(range(9_999, -1, -1))
            assert await pair.pull(records, dest_blocks) == 640_000
            expect_only(pair, records, dest_blocks)

    @pytest.mark.parametrize("block_bytes", [4097, 1_500_000])
    async def test_blocks_of_any_size(self, block_bytes):
        async with self.pair(6, block_bytes) as pair:
            records = pair.offer(5)
            pair.dest[:] = UNTOUCHED
            await pair.pull(records, [0, 1, 3, 4, 5])
            expect_only(pair, records, [0, 1, 3, 4, 5])

    async def test_repeated_and_reordered_requests(self):
        async with self.pair() as pair:
            records = pair.offer(8)
            pair.dest[:] = UNTOUCHED
            await pair.pull(records, list(range(8)))
            await pair.pull(records[::-1], list(range(8, 16)))
            await pair.pull(records, list(range(8)))
            expect_only(pair, records + records[::-1], list(range(16)))

    async def test_many_pulls_at_the_same_time(self):
        async with self.pair(128, 65_536) as pair:
            records = pair.offer(128)
            order = pair.rng.sample(range(128), 128)
            parts = [slice(start, start + 16) for start in range(0, 128, 16)]
            await asyncio.gather(*(pair.pull(records[part], order[part]) for part in parts))
            expect_only(pair, records, order)

    # -- refusing what is not what was announced -------------------------------------------------------------------

    async def test_corrupted_bytes_are_noticed(self):
        async with self.pair() as pair:
            records = pair.offer(4)
            pair.arena.bytes_view()[records[2].block_id, 1000] ^= 1
            with pytest.raises(DigestMismatchError, match="block 2 "):
                await pair.pull(records, [0, 1, 2, 3])
            await pair.pull(records[:2], [0, 1])

    async def test_a_source_without_digests_is_refused(self):
        async with self.pair() as pair:
            records = [replace(record, digest=0) for record in pair.offer(1)]
            with pytest.raises(DigestMismatchError, match=r"transfer\.digest"):
                await pair.pull(records, [0])

    async def test_digests_can_be_off(self):
        async with self.pair(digest=False) as pair:
            records = [replace(record, digest=0) for record in pair.offer(3)]
            await pair.pull(records, [0, 1, 2])
            assert np.array_equal(pair.dest[:3], pair.source_bytes(records))

    @pytest.mark.parametrize("epoch", [EPOCH - 1, EPOCH + 1])
    @pytest.mark.parametrize("count", [0, 2])
    async def test_another_epoch_is_refused(self, epoch, count):
        async with self.pair() as pair:
            records = pair.offer(count)
            pair.source = replace(pair.source, epoch=epoch)
            pair.dest[:] = UNTOUCHED
            with pytest.raises(StaleEpochError):
                await pair.pull(records, list(range(count)))
            assert (pair.dest == UNTOUCHED).all()

    async def test_a_block_handed_out_again_is_named(self):
        async with self.pair() as pair:
            records = pair.offer(6)
            pair.hand_out_again(records[4])
            with pytest.raises(BlocksGoneError) as caught:
                await pair.pull(records, list(range(6)))
            assert caught.value.indices == (4,)
            await pair.pull(records[:4], list(range(4)))

    async def test_bytes_of_a_later_owner_never_pass_for_the_announced_ones(self):
        """Without digests, so that the generation words alone must tell."""
        async with self.pair(40, 32_768, digest=False) as pair:
            outcomes = []
            for _ in range(25):
                records = pair.offer(30)
                expected = pair.source_bytes(records)
                pulling = asyncio.create_task(pair.pull(records, list(range(30))))
                reusing = asyncio.to_thread(pair.hand_out_again, records[pair.rng.randrange(30)])
                results = await asyncio.gather(pulling, reusing, return_exceptions=True)
                assert results[1] is None
                outcomes.append(isinstance(results[0], BlocksGoneError))
                if not outcomes[-1]:
                    assert results[0] == 30 * 32_768
                    assert np.array_equal(pair.dest[:30], expected)
                pair.inventory.release([record.block_id for record in records])
            assert len(outcomes) == 25

    async def test_places_outside_the_arena_are_refused(self):
        async with self.pair() as pair:
            (record,) = pair.offer(1)
            with pytest.raises(TransferError):
                await pair.pull([replace(record, block_id=64)], [0])

    async def test_our_own_mistakes_are_assertions(self):
        async with self.pair() as pair:
            records = pair.offer(2)
            for dest_blocks in ([0], [3, 3], [0, 64], [-1, 0]):
                with pytest.raises(AssertionError):
                    await pair.pull(records, dest_blocks)

    async def test_blocks_of_another_size_are_refused(self):
        async with self.pair() as pair:
            records = pair.offer(2)
            pair.dest[:] = UNTOUCHED
            other = await self.other_size(pair, 1024)
            with pytest.raises(TransferError):
                await other.pull(pair.source, KEY, records, [0, 1])

    @abstractmethod
    async def other_size(self, pair: Pair, block_bytes: int) -> Transport:
        """A transport to the same source with a destination of other blocks."""

    # -- peers that leave or hang, callers that give up --------------------------------------------------------------

    async def test_a_source_that_is_gone_is_an_error_soon(self):
        async with self.pair(timeout_s=10.0) as pair:
            records = pair.offer(2)
            await pair.pull(records, [0, 1])
            await self.vanish(pair)
            async with asyncio.timeout(10):
                with pytest.raises(TransferError):
                    await pair.pull(records, [2, 3])

    async def test_a_source_that_goes_half_way(self):
        async with self.pair(64, 400_000, timeout_s=10.0) as pair:
            records = pair.offer(64)
            expected = pair.source_bytes(records)
            pulling = asyncio.create_task(pair.pull(records, list(range(64))))
            await until(lambda: bool(pair.dest.any()))
            await self.vanish(pair)
            try:
                async with asyncio.timeout(10):
                    await pulling
            except TransferError:
                return
            assert np.array_equal(pair.dest, expected), "a pull that succeeds has everything"

    async def test_a_stalled_source_meets_the_deadline(self):
        async with self.pair(64, 65_536, timeout_s=0.3) as pair:
            records = pair.offer(64)
            async with self.stalled(pair):
                pair.dest[:] = UNTOUCHED
                async with asyncio.timeout(5):
                    with pytest.raises(TransferError, match=r"pull_timeout_s|Deadline"):
                        await pair.pull(records, list(range(64)))
            await settle()
            assert (pair.dest == UNTOUCHED).all(), "nothing is written once the pull has failed"

    @pytest.mark.parametrize("turns", [1, 3, 30])
    async def test_nothing_is_written_after_a_cancel(self, turns):
        async with self.pair(64, 400_000) as pair:
            records = pair.offer(64)
            pulling = asyncio.create_task(pair.pull(records, list(range(64))))
            for _ in range(turns):
                await asyncio.sleep(0)
            pulling.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await pulling
            assert pulling.cancelled() or pulling.done()
            pair.dest[:] = UNTOUCHED
            await settle()
            assert (pair.dest == UNTOUCHED).all()
            await pair.pull(records[:1], [0])

    async def test_closing_twice_is_fine(self):
        async with self.pair() as pair:
            await pair.transport.close()
            await pair.transport.close()


def expect_only(pair: Pair, records: Sequence[BlockRecord], dest_blocks: Sequence[int]) -> None:
    """Those blocks have arrived, and where none was asked for nothing was touched."""
    assert np.array_equal(pair.dest[list(dest_blocks)], pair.source_bytes(records))
    others = np.setdiff1d(np.arange(pair.dest.shape[0]), dest_blocks)
    assert (pair.dest[others] == UNTOUCHED).all()


async def until(condition, timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110  (other threads and peers change it)
            await asyncio.sleep(0.001)


async def settle() -> None:
    """Lets threads and callbacks that should not be there show themselves."""
    for _ in range(20):
        await asyncio.sleep(0.001)


def new_exports(arena: Arena, inventory: Inventory) -> Exports:
    return Exports(EPOCH, arena, inventory, SystemClock())


def source_of(arena: Arena, grpc_address: str = "127.0.0.1:1", host_id: str = "here", tcp_address: str = "") -> KvSource:
    names = ("loopback", "shm", "tcp", "grpc")
    return KvSource("prefill-0", EPOCH, grpc_address, host_id, arena.path, arena.num_blocks, names, tcp_address)
