"""The names of the ways a block's bytes may travel, and the digest that proves they arrived: xxh3-64."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import xxhash

from core.errors import DigestMismatchError, LayoutMismatchError
from kvtransfer.arena import Blocks

RAW, PLANES, INT8 = "raw", "planes", "int8"
CODECS = (RAW, PLANES, INT8)
LOSSY = frozenset({INT8})
AUTO = "auto"  # of a ticket: whichever keeps every bit, as suits the link
NO_DIGEST = 0  # in a record: digests are off at the source


def check_codec(codec: str) -> None:
    """Raises LayoutMismatchError for a ticket's codec that this version cannot undo."""
    if codec not in (*CODECS, AUTO):
        raise unknown_codec(CODECS, codec)


def unknown_codec(here: Iterable[str], there: str) -> LayoutMismatchError:
    return LayoutMismatchError(f"codec differs: {', '.join(here)} here, {there} there")


def digest_of(span: Blocks) -> int:
    """xxh3-64 of a contiguous span of bytes, never 0, which says 'no digest'."""
    return xxhash.xxh3_64_intdigest(span.data) or 1


def digests_of(blocks: Blocks, block_ids: Sequence[int]) -> list[int]:
    return [digest_of(blocks[block]) for block in block_ids]


def check_digest(span: Blocks, expected: int, index: int) -> None:
    """Raises DigestMismatchError, naming the block by its index in the request."""
    if expected == NO_DIGEST:
        raise DigestMismatchError(f"block {index} was announced without a digest; set transfer.digest alike on all workers")
    found = digest_of(span)
    if found != expected:
        raise DigestMismatchError(f"block {index} arrived with digest {found:016x}, announced was {expected:016x}")


def agreed(proposed: str, accepted: str) -> str:
    """What a puller asks for: the ticket's codec, unless that is a lossy one other than the one it accepts: then raw."""
    return RAW if proposed in LOSSY and proposed != accepted else proposed
