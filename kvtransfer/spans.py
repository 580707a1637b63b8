"""Runs of blocks that are neighbours on both sides, so that one copy moves many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Span(NamedTuple):
    """`num_blocks` blocks from `source` to `dest`, each consecutive; `first` is the first one's place in the list."""

    first: int
    source: int
    dest: int
    num_blocks: int


def coalesce(source_blocks: Sequence[int], dest_blocks: Sequence[int], blocks_max: int) -> Iterator[Span]:
    """Cuts the pairs, in order, into the longest spans of at most `blocks_max` blocks."""
    assert len(source_blocks) == len(dest_blocks), "every block has one destination"
    start, total = 0, len(source_blocks)
    while start < total:
        count = 1
        while (
            count < blocks_max
            and start + count < total
            and source_blocks[start + count] == source_blocks[start] + count
            and dest_blocks[start + count] == dest_blocks[start] + count
        ):
            count += 1
        yield Span(start, source_blocks[start], dest_blocks[start], count)
        start += count
