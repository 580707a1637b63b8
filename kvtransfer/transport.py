"""What every way of moving blocks owes its caller, and the checks that none of them may skip."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from core.blocks import BlockRecord, KvSource
from core.errors import LeaseExpiredError, TransferError
from core.request import AttemptKey
from kvtransfer.arena import Blocks
from kvtransfer.codec import RAW


class PullResult(NamedTuple):
    bytes: int
    """Of the blocks, as they lie in memory."""
    seconds: float
    codec: str = RAW
    """What they really went through."""
    wire_bytes: int = 0
    """What crossed the link instead, when they were encoded."""
    transport: str = ""
    """By which the blocks came; filled in by whoever chose it."""


class BlocksGoneError(LeaseExpiredError):
    """Blocks were handed out again at the source before or while they were read; `indices` are their places in the request."""

    code = "blocks_gone"

    def __init__(self, indices: Sequence[int]) -> None:
        super().__init__(f"blocks {_some(indices)} were handed out again at the source before they were read")
        self.indices = tuple(indices)


class Transport(Protocol):
    """Pulls blocks of one source's arena into the destination it was built with.

    Any number of pulls may run at the same time. A pull writes into its own `dest_blocks` only, and into none of them once
    it has returned or raised, also when it was cancelled. It returns when every block has arrived, of the announced
    generation and with the announced digest; a pull of no blocks opens what later pulls need and checks the epoch.

    Raises StaleEpochError (the source is another incarnation), BlocksGoneError, LeaseExpiredError (the source no longer
    holds the hand-off), DigestMismatchError, LayoutMismatchError (blocks of another size), and TransferError for everything
    else, running out of its time included. What dest_blocks hold then is undefined; nothing has been committed.
    """

    @property
    def name(self) -> str: ...

    async def pull(
        self, source: KvSource, key: AttemptKey, records: Sequence[BlockRecord], dest_blocks: Sequence[int], codec: str = RAW
    ) -> PullResult:
        """`codec` is how the blocks are to be encoded on a network link. What shares memory moves them raw all the same;
        the result says what was done. Raises LayoutMismatchError for a codec that either end does not have, EncodingError
        for an encoding that is none."""
        ...

    def forget(self, source: KvSource) -> None:
        """Drops what is cached of an incarnation that is gone."""
        ...

    async def close(self) -> None:
        """Ends what is running and gives everything back. Idempotent."""
        ...


def check_request(records: Sequence[BlockRecord], dest_blocks: Sequence[int], dest: Blocks) -> None:
    """Our own mistakes, before a byte is written."""
    assert len(records) == len(dest_blocks), "every record has one destination"
    assert len(set(dest_blocks)) == len(dest_blocks), "two records would be written into one block"
    assert not dest_blocks or (min(dest_blocks) >= 0 and max(dest_blocks) < dest.shape[0]), "a destination outside the arena"


def check_places(records: Sequence[BlockRecord], num_blocks: int) -> None:
    """Raises TransferError for a record that points outside the source's arena: a peer's mistake, not ours."""
    outside = [record.index for record in records if not 0 <= record.block_id < num_blocks]
    if outside:
        raise TransferError(f"blocks {_some(outside)} were announced outside the source's {num_blocks} blocks")


def _some(indices: Sequence[int]) -> str:
    shown = ", ".join(map(str, indices[:8]))
    return shown if len(indices) <= 8 else f"{shown} and {len(indices) - 8} more"
