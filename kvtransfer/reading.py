"""The answer to a Read: blocks of an arena cut into chunks, as they are or encoded.

No chunk is handed out whose blocks changed before or while it was read: BlocksGoneError instead.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence

import numpy as np

from core.blocks import BlockRecord
from core.errors import DigestMismatchError
from kvtransfer.arena import Arena
from kvtransfer.codecs import Codec
from kvtransfer.encoded import Encoding, check_before, encode_blocks
from kvtransfer.raw_chunk import data_head
from kvtransfer.transport import BlocksGoneError
from tandem.v1 import kv_pb2

CHUNK_BYTES = 2**20


def read_spans(arena: Arena, records: Sequence[BlockRecord], chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
    """The blocks' bytes in the order of `records`, `chunk_bytes` to a ReadChunk message, fewer in the last."""
    size = arena.block_bytes
    blocks = arena.bytes_view()
    for start in range(0, len(records) * size, chunk_bytes):
        stop = min(start + chunk_bytes, len(records) * size)
        first, last = start // size, (stop - 1) // size
        touched = records[first : last + 1]
        views = [blocks[record.block_id].data for record in touched]
        views[-1] = views[-1][: stop - last * size]
        views[0] = views[0][start - first * size :]
        _check_generations(arena, touched)
        chunk = b"".join([data_head(stop - start), *views])
        _check_generations(arena, touched)
        yield chunk


async def read_encoded(arena: Arena, records: Sequence[BlockRecord], codec: Codec) -> AsyncIterator[kv_pb2.ReadChunk]:
    """The same through a codec, in a thread. Raises DigestMismatchError for bytes that are not the announced ones."""
    group_blocks = max(1, CHUNK_BYTES // arena.block_bytes)
    for start in range(0, len(records), group_blocks):
        group = records[start : start + group_blocks]
        for chunk in _chunks(await asyncio.to_thread(_encode, arena, group, codec)):
            yield chunk


def _encode(arena: Arena, records: Sequence[BlockRecord], codec: Codec) -> list[Encoding]:
    blocks = arena.bytes_view()
    _check_generations(arena, records)
    try:
        check_before(codec, blocks, [(record.index, record.block_id, record.digest) for record in records])
    except DigestMismatchError:
        _check_generations(arena, records)  # bytes of a later owner are not corrupted, they are another's
        raise
    encodings = encode_blocks(codec, blocks, [record.block_id for record in records])
    _check_generations(arena, records)
    return encodings


def _chunks(encodings: Sequence[Encoding]) -> Iterator[kv_pb2.ReadChunk]:
    joined = b"".join([encoding.data.data for encoding in encodings])
    begins = [kv_pb2.Encoding(length=encoding.data.nbytes, digest=encoding.digest) for encoding in encodings]
    for start in range(0, len(joined), CHUNK_BYTES):
        yield kv_pb2.ReadChunk(data=joined[start : start + CHUNK_BYTES], begins=begins if not start else ())


def _check_generations(arena: Arena, records: Sequence[BlockRecord]) -> None:
    words = arena.generations
    gone = [record.index for record in records if words[record.block_id] != np.uint64(record.generation)]
    if gone:
        raise BlocksGoneError(gone)
