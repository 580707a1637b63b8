"""Blocks on their way into a segment file."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass

from core.blocks import BlockKey
from kvtransfer.arena import Blocks
from kvtransfer.disk_index import Tenant
from kvtransfer.segment_file import SegmentFile


@dataclass(frozen=True, slots=True)
class Written:
    key: BlockKey
    bytes: Blocks  # [block_bytes], not to change until `append` is back
    tenant: Tenant
    cost_s: float


@dataclass(frozen=True, slots=True)
class Appending:
    """Blocks whose bytes are on their way into consecutive slots from `first`."""

    file: SegmentFile
    first: int
    blocks: Sequence[Written]
    written: Future[None]
    began_s: float

    def settle(self) -> None:
        """Comes back when nobody reads the blocks any more; they do not count unless `finish` makes them."""
        wait([self.written])
