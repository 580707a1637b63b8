"""Blocks through a codec over tcp and grpc: what arrives, what is refused, and what damaged encodings come to."""

from __future__ import annotations

import asyncio
import contextlib
from contextlib import asynccontextmanager
from dataclasses import replace

import numpy as np
import pytest
from transport_suite import KEY, UNTOUCHED, Pair, settle, source_of

from core.blocks import BlockRecord, KvLayout
from core.clock import SystemClock
from core.errors import DigestMismatchError, LayoutMismatchError, TransferError
from core.inventory import Inventory
from core.service import Registration, serve
from kvtransfer.arena import HostArena
from kvtransfer.channels import Channels
from kvtransfer.codec import digest_of
from kvtransfer.codecs import Codec, Codecs, make_codec
from kvtransfer.encoding_error import EncodingError
from kvtransfer.exports import Exports
from kvtransfer.grpc_transport import GrpcTransport
from kvtransfer.service import KvServicer
from kvtransfer.tcp import TcpTransport
from kvtransfer.tcp_server import TcpServer
from kvtransfer.transport import BlocksGoneError
from tandem.v1.kv_pb2_grpc import add_KvServicer_to_server

SMALL = KvLayout(b"f" * 16, "float32", 2, 2, 8, 16)  # 4 KiB a block
MIDDLE = replace(SMALL, num_layers=64)  # 128 KiB
LARGE = replace(SMALL, dtype="bfloat16", num_layers=512, head_dim=20)  # 1.25 MiB: more than a chunk or a group holds
CODECS = ["planes", "int8"]
EPOCH = 7


@pytest.fixture(params=["tcp", "grpc"])
def link(request) -> str:
    return request.param


@pytest.fixture(params=["raw", *CODECS])
def codec(request) -> str:
    return request.param


@asynccontextmanager
async def ends(link: str, layout: KvLayout = SMALL, num_blocks: int = 64, *, digest: bool = True, theirs: bool = True):
    """`theirs`: whether the source has codecs."""
    arena = HostArena(num_blocks, layout.block_bytes)
    inventory, dest = Inventory(num_blocks, arena.generation_words()), np.zeros((num_blocks, layout.block_bytes), np.uint8)
    exports = Exports(EPOCH, arena, inventory, SystemClock(), layout=layout if theirs else None)
    exports.open(KEY, 60.0)
    channels, codecs = Channels(), Codecs(layout)
    tcp = TcpServer(exports, "127.0.0.1:0")
    service = Registration("tandem.v1.Kv", add_KvServicer_to_server, KvServicer(exports))
    async with serve("127.0.0.1:0", service, grace_s=0.0) as server:
        transport = (
            TcpTransport(dest, digest=digest, timeout_s=20.0, codecs=codecs)
            if link == "tcp"
            else GrpcTransport(dest, channels, digest=digest, timeout_s=20.0, codecs=codecs)
        )
        yield KvPair(arena, inventory, exports, source_of(arena, server.address, tcp_address=tcp.address), dest, transport)
        await transport.close()
        await channels.close()
        await exports.close()
        await asyncio.to_thread(tcp.close)


class KvPair(Pair):
    """Blocks hold numbers, so that codecs have something to do."""

    def fill(self, index: int, block: int) -> BlockRecord:
        span = self.arena.bytes_view()[block]
        span[:] = self.bytes_rng.standard_normal(span.size // 4, np.float32).view(np.uint8)
        if index % 5 == 4:
            span[:] = 255  # not a number: int8 sends these as they are
        return BlockRecord(index, bytes(16), block, self.inventory.generation(block), digest_of(span), 16)

    def expect(self, records, dest_blocks, codec: str, layout: KvLayout) -> None:
        made = make_codec(codec, layout)
        for record, block in zip(records, dest_blocks, strict=True):
            out = np.empty(layout.block_bytes, np.uint8)
            made.decode(made.encode(self.arena.bytes_view()[record.block_id]), out)
            assert np.array_equal(self.dest[block], out), f"block {record.index}"
        others = np.setdiff1d(np.arange(self.dest.shape[0]), dest_blocks)
        assert (self.dest[others] == UNTOUCHED).all()


# -- moving blocks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "count"), [(SMALL, 0), (SMALL, 1), (SMALL, 33), (MIDDLE, 40), (LARGE, 3)])
async def test_blocks_arrive_as_the_codec_gives_them_back(link, codec, layout, count):
    async with ends(link, layout, count + 2) as pair:
        records = pair.offer(count, scattered=True)
        pair.dest[:] = UNTOUCHED
        dest_blocks = list(range(count, 0, -1))
        result = await pair.transport.pull(pair.source, KEY, records, dest_blocks, codec)
        pair.expect(records, dest_blocks, codec, layout)
        assert (result.bytes, result.codec) == (count * layout.block_bytes, codec)
        made = make_codec(codec, layout)
        wire_bytes = sum(made.encode(pair.arena.bytes_view()[record.block_id]).nbytes for record in records)
        assert result.wire_bytes == (0 if codec == "raw" else wire_bytes)


async def test_codecs_take_turns_on_the_same_connections(link):
    async with ends(link) as pair:
        records = pair.offer(20)
        for codec in ("raw", "int8", "planes", "raw", "planes"):
            pair.dest[:] = UNTOUCHED
            await pair.transport.pull(pair.source, KEY, records, range(20), codec)
            pair.expect(records, list(range(20)), codec, SMALL)


async def test_many_pulls_at_the_same_time(link, codec):
    async with ends(link, MIDDLE, 64) as pair:
        records = pair.offer(64)
        pulls = (pair.transport.pull(pair.source, KEY, records[i : i + 8], range(i, i + 8), codec) for i in range(0, 64, 8))
        await asyncio.gather(*pulls)
        pair.expect(records, list(range(64)), codec, MIDDLE)


async def test_digests_can_be_off(link, codec):
    async with ends(link, digest=False) as pair:
        records = [replace(record, digest=0) for record in pair.offer(3)]
        pair.dest[:] = UNTOUCHED
        await pair.transport.pull(pair.source, KEY, records, [0, 1, 2], codec)
        pair.expect(records, [0, 1, 2], codec, SMALL)


# -- refusing --------------------------------------------------------------------------------------------------------


async def test_corrupted_bytes_at_the_source_are_noticed(link, codec):
    """Also by a lossy codec, whose encoding of them is perfectly sound."""
    async with ends(link) as pair:
        records = pair.offer(8)
        pair.arena.bytes_view()[records[2].block_id, 1000] ^= 1
        with pytest.raises(DigestMismatchError, match="block 2 "):
            await pair.transport.pull(pair.source, KEY, records, range(8), codec)
        await pair.transport.pull(pair.source, KEY, records[:2], [0, 1], codec)


async def test_a_source_without_digests_is_refused(link, codec):
    async with ends(link) as pair:
        records = [replace(record, digest=0) for record in pair.offer(1)]
        with pytest.raises(DigestMismatchError, match=r"transfer\.digest"):
            await pair.transport.pull(pair.source, KEY, records, [0], codec)


async def test_a_block_handed_out_again_is_named(link, codec):
    async with ends(link) as pair:
        records = pair.offer(6)
        pair.hand_out_again(records[4])
        with pytest.raises(BlocksGoneError) as caught:
            await pair.transport.pull(pair.source, KEY, records, range(6), codec)
        assert caught.value.indices == (4,)


@pytest.mark.parametrize("codec", CODECS)
async def test_a_codec_that_one_end_lacks_is_refused_by_name(link, codec):
    async with ends(link, theirs=False) as pair:
        records = pair.offer(2)
        with pytest.raises(LayoutMismatchError, match=f"codec differs: raw here, {codec} there"):
            await pair.transport.pull(pair.source, KEY, records, [0, 1], codec)
        await pair.transport.pull(pair.source, KEY, records, [0, 1])
        with pytest.raises(LayoutMismatchError, match="codec differs: raw, planes, int8 here, int2 there"):
            await pair.transport.pull(pair.source, KEY, records, [0, 1], "int2")


# -- damaged encodings -----------------------------------------------------------------------------------------------


class Damaging:
    """A source whose encodings of one block are not what its codec makes of it."""

    def __init__(self, codec: Codec, damage: str, block: int, blocks: np.ndarray) -> None:
        self._codec = codec
        self._damage = damage
        self._block = blocks[block].ctypes.data
        self.name, self.lossy, self.encoded_bytes_max = codec.name, codec.lossy, codec.encoded_bytes_max

    def encode(self, block: np.ndarray) -> np.ndarray:
        data = self._codec.encode(block).copy()
        if block.ctypes.data != self._block:
            return data
        match self._damage:
            case "cut":
                return data[:-3]
            case "grown":
                return np.concatenate([data, data])[: self.encoded_bytes_max]
            case "too long":
                return np.zeros(self.encoded_bytes_max + 1, np.uint8)
            case "empty":
                return data[:0]
            case _:
                data[data.size // 2 :: 97] ^= 255
                return data

    def decode(self, data: np.ndarray, out: np.ndarray) -> None:
        raise AssertionError("a source decodes nothing")


@pytest.mark.parametrize("damage", ["flipped", "cut", "grown", "too long", "empty"])
@pytest.mark.parametrize("codec", CODECS)
async def test_damaged_encodings_are_noticed_and_raw_still_works(link, codec, damage):
    async with ends(link) as pair:
        records = pair.offer(12)
        made = make_codec(codec, SMALL)
        damaging = Damaging(made, damage, records[7].block_id, pair.arena.bytes_view())
        pair.exports.codecs._made[codec] = damaging
        if (codec, damage) == ("int8", "flipped"):  # the digest of the encoding is of the damaged one: its structure must tell
            damaging.encode = scales_damaged(damaging)
        pair.dest[:] = UNTOUCHED
        with pytest.raises((EncodingError, DigestMismatchError)):
            await pair.transport.pull(pair.source, KEY, records, range(12), codec)
        assert (pair.dest[12:] == UNTOUCHED).all()
        await pair.transport.pull(pair.source, KEY, records, range(12))
        assert np.array_equal(pair.dest[:12], pair.source_bytes(records))


def scales_damaged(damaging: Damaging):
    def encode(block: np.ndarray) -> np.ndarray:
        data = damaging._codec.encode(block).copy()
        if block.ctypes.data == damaging._block:
            data[:4] = np.array([np.nan], np.float32).view(np.uint8)
        return data

    return encode


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("turns", [1, 30])
async def test_nothing_is_written_after_a_cancel(link, codec, turns):
    async with ends(link, MIDDLE, 64) as pair:
        records = pair.offer(64)
        pulling = asyncio.create_task(pair.transport.pull(pair.source, KEY, records, range(64), codec))
        for _ in range(turns):
            await asyncio.sleep(0)
        pulling.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await pulling
        pair.dest[:] = UNTOUCHED
        await settle()
        assert (pair.dest == UNTOUCHED).all()
        await pair.transport.pull(pair.source, KEY, records[:1], [0], codec)


async def test_another_size_of_blocks_is_refused(link, codec):
    async with ends(link) as pair, ends(link, MIDDLE) as other:
        with pytest.raises(TransferError):
            await other.transport.pull(pair.source, KEY, pair.offer(2), [0, 1], codec)
