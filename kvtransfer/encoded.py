"""A block on its way through a codec, and the digests that prove it. What tcp and grpc have in common there.

Of a lossless codec the digest of the plain bytes, announced with the block, tells at the far end that all went well. A lossy
one gives back other bytes, so the proof has two halves: the source checks the block against the announced digest before it
encodes it, and sends a digest of the encoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from core.blocks import BlockRecord
from core.errors import DigestMismatchError
from kvtransfer.arena import Blocks
from kvtransfer.codec import NO_DIGEST, check_digest, digest_of
from kvtransfer.codecs import Codec
from kvtransfer.encoding_error import EncodingError


class Encoding(NamedTuple):
    data: Blocks
    digest: int
    """Of `data`; NO_DIGEST from a lossless codec."""


def encode_blocks(codec: Codec, blocks: Blocks, block_ids: Sequence[int]) -> list[Encoding]:
    """Takes milliseconds per MiB: not on an event loop."""
    encoded = [codec.encode(blocks[block]) for block in block_ids]
    return [Encoding(data, digest_of(data) if codec.lossy else NO_DIGEST) for data in encoded]


def check_before(codec: Codec, blocks: Blocks, places: Sequence[tuple[int, int, int]]) -> None:
    """At the source. `places`: (index, block id, announced digest). Raises DigestMismatchError naming the index.

    For lossy codecs only, nobody could tell afterwards; a digest of NO_DIGEST is nothing to check against.
    """
    if codec.lossy:
        for index, block, digest in places:
            if digest != NO_DIGEST:
                check_digest(blocks[block], digest, index)


def check_length(codec: Codec, length: int, index: int) -> None:
    """Before memory is taken for it. Raises EncodingError."""
    if not 0 < length <= codec.encoded_bytes_max:
        raise EncodingError(
            f"block {index} is said to have {length} bytes as {codec.name}, which makes 1 to {codec.encoded_bytes_max}"
        )


def decode_block(codec: Codec, encoding: Encoding, out: Blocks, record: BlockRecord, *, digest: bool) -> None:
    """At the far end, into the block's own place. Raises EncodingError, or DigestMismatchError when digests are on."""
    if digest and record.digest == NO_DIGEST:
        check_digest(out, NO_DIGEST, record.index)
    if digest and codec.lossy:
        if encoding.digest == NO_DIGEST:
            raise DigestMismatchError(f"block {record.index} came as {codec.name} without a digest of its encoding")
        check_digest(encoding.data, encoding.digest, record.index)
    codec.decode(encoding.data, out)
    if digest and not codec.lossy:
        check_digest(out, record.digest, record.index)
