"""How a request is cut into the messages of a process group: each one tensor on both sides. Deciding code."""

from __future__ import annotations

from collections.abc import Sequence

from kvtransfer.spans import coalesce

PIECE_BYTES_MAX = 4 * 2**20
"""Of neighbours: what one end has put into the socket the other takes out while it is in the processor's cache. Of less, the
waking of threads at both ends costs more than that gains. Digests of one piece are computed while the next are on their way."""
GATHERED_BYTES_MAX = 4 * 2**20
"""Of a piece that goes through a buffer, so that the buffer stays in the processor's cache."""
RUN_BYTES_MIN = 256 * 1024
"""A run of neighbours at both ends from this size on is a piece of its own, read and written in place. Shorter ones are
gathered and scattered together: a copy costs less than a message."""


def cut(source_blocks: Sequence[int], dest_blocks: Sequence[int], block_bytes: int) -> list[int]:
    """Blocks per piece, in order; they add up to all of them. A piece is at most PIECE_BYTES_MAX, or one block."""
    most, gathered = max(1, PIECE_BYTES_MAX // block_bytes), max(1, GATHERED_BYTES_MAX // block_bytes)
    pieces: list[int] = []
    loose = 0
    for span in coalesce(source_blocks, dest_blocks, most):
        alone = span.num_blocks * block_bytes >= RUN_BYTES_MIN
        if loose and (alone or loose + span.num_blocks > gathered):
            pieces.append(loose)
            loose = 0
        if alone:
            pieces.append(span.num_blocks)
        else:
            loose += span.num_blocks
    return [*pieces, loose] if loose else pieces


def check_pieces(pieces: Sequence[int], num_blocks: int, block_bytes: int) -> str | None:
    """What is wrong with pieces that a peer asked for; None when they can be sent."""
    most = max(1, PIECE_BYTES_MAX // block_bytes)
    if any(not 1 <= piece <= most for piece in pieces):
        return f"a piece has 1 to {most} blocks of {block_bytes} bytes, not {max(pieces)}"
    if sum(pieces) != num_blocks:
        return f"pieces of {sum(pieces)} blocks in all for {num_blocks} blocks"
    return None
