"""Runs of blocks that are neighbours on both sides, so that one copy moves many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

FEW = 32  # blocks up to which a loop is quicker than arrays


class Span(NamedTuple):
    """`num_blocks` blocks from `source` to `dest`, each consecutive; `first` is the first one's place in the list."""

    first: int
    source: int
    dest: int
    num_blocks: int


def coalesce(source_blocks: Sequence[int], dest_blocks: Sequence[int], blocks_max: int) -> Iterator[Span]:
    """Cuts the pairs, in order, into the longest spans of at most `blocks_max` blocks."""
    assert len(source_blocks) == len(dest_blocks), "every block has one destination"
    for start, stop in pairwise(_breaks(source_blocks, dest_blocks)):
        for first in range(start, stop, blocks_max):
            yield Span(first, source_blocks[first], dest_blocks[first], min(blocks_max, stop - first))


def _breaks(source_blocks: Sequence[int], dest_blocks: Sequence[int]) -> list[int]:
    """Where runs of neighbours begin, and the end of the last."""
    total = len(source_blocks)
    if total and consecutive(source_blocks) and consecutive(dest_blocks):
        return [0, total]
    if total <= FEW:
        pairs = list(zip(source_blocks, dest_blocks, strict=True))
        inner = [at for at in range(1, total) if pairs[at] != (pairs[at - 1][0] + 1, pairs[at - 1][1] + 1)]
    else:
        source, dest = (np.fromiter(blocks, np.int64, total) for blocks in (source_blocks, dest_blocks))
        inner = (1 + np.flatnonzero((source[1:] - source[:-1] != 1) | (dest[1:] - dest[:-1] != 1))).tolist()
    return [0, *inner, total] if total else []


def consecutive(blocks: Sequence[int]) -> bool:
    """As a copy for the most part is, of one prompt: told in a tenth of the time that finding breaks takes."""
    first, total = blocks[0], len(blocks)
    return blocks[-1] - first == total - 1 and list(blocks) == list(range(first, first + total))
