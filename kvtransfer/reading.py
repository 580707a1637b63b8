"""The answer to a Read: blocks of an arena cut into chunks, as they are or encoded.

No chunk is handed out whose blocks changed before or while it was read: BlocksGoneError instead.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence

import numpy as np

from core.errors import DigestMismatchError, InvalidRequestError
from kvtransfer.arena import Arena
from kvtransfer.codecs import Codec
from kvtransfer.encoded import Encoding, check_before, encode_blocks
from kvtransfer.raw_chunk import data_head
from kvtransfer.transport import BlocksGoneError
from tandem.v1 import kv_pb2

CHUNK_BYTES = 2**20


class Asked:
    """What a Read asks for, column by column: a block costs no object of its own."""

    def __init__(
        self, indices: Sequence[int], block_ids: Sequence[int], generations: Sequence[int], digests: Sequence[int] = ()
    ) -> None:
        """`digests` are for `read_encoded` alone. Raises InvalidRequestError for columns that are not of one length."""
        lengths = {len(indices), len(block_ids), len(generations), len(digests) or len(block_ids)}
        if len(lengths) > 1:
            raise InvalidRequestError("a Read has as many indices and generations as block ids, and as many digests or none")
        self.indices, self.block_ids, self.generations, self.digests = indices, block_ids, generations, digests
        self._ids = np.array(self.block_ids, np.intp)
        self._generations = np.array(self.generations, np.uint64)

    def __len__(self) -> int:
        return len(self.block_ids)

    def check_generations(self, arena: Arena, part: slice) -> None:
        """Raises BlocksGoneError when blocks of `part` are others by now."""
        changed = np.flatnonzero(arena.generations[self._ids[part]] != self._generations[part])
        if changed.size:
            raise BlocksGoneError([self.indices[part][place] for place in changed.tolist()])


def read_spans(arena: Arena, asked: Asked, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
    """The blocks' bytes in the order asked for, `chunk_bytes` to a ReadChunk message, fewer in the last."""
    size = arena.block_bytes
    blocks = arena.bytes_view()
    for start in range(0, len(asked) * size, chunk_bytes):
        stop = min(start + chunk_bytes, len(asked) * size)
        first, last = start // size, (stop - 1) // size
        touched = slice(first, last + 1)
        views = [blocks[block].data for block in asked.block_ids[touched]]
        views[-1] = views[-1][: stop - last * size]
        views[0] = views[0][start - first * size :]
        asked.check_generations(arena, touched)
        chunk = b"".join([data_head(stop - start), *views])
        asked.check_generations(arena, touched)
        yield chunk


async def read_encoded(arena: Arena, asked: Asked, codec: Codec) -> AsyncIterator[kv_pb2.ReadChunk]:
    """The same through a codec, in a thread. Raises DigestMismatchError for bytes that are not the announced ones."""
    group_blocks = max(1, CHUNK_BYTES // arena.block_bytes)
    for start in range(0, len(asked), group_blocks):
        group = slice(start, start + group_blocks)
        for chunk in _chunks(await asyncio.to_thread(_encode, arena, asked, group, codec)):
            yield chunk


def _encode(arena: Arena, asked: Asked, group: slice, codec: Codec) -> list[Encoding]:
    blocks, block_ids = arena.bytes_view(), asked.block_ids[group]
    asked.check_generations(arena, group)
    try:
        check_before(codec, blocks, list(zip(asked.indices[group], block_ids, asked.digests[group], strict=True)))
    except DigestMismatchError:
        asked.check_generations(arena, group)  # bytes of a later owner are not corrupted, they are another's
        raise
    encodings = encode_blocks(codec, blocks, block_ids)
    asked.check_generations(arena, group)
    return encodings


def _chunks(encodings: Sequence[Encoding]) -> Iterator[kv_pb2.ReadChunk]:
    joined = b"".join([encoding.data.data for encoding in encodings])
    begins = [kv_pb2.Encoding(length=encoding.data.nbytes, digest=encoding.digest) for encoding in encodings]
    for start in range(0, len(joined), CHUNK_BYTES):
        yield kv_pb2.ReadChunk(data=joined[start : start + CHUNK_BYTES], begins=begins if not start else ())
