"""Copies blocks between two mapped arenas: inline when that is quicker than asking a thread, else in a small pool.

The generation words of the source are read before and after the copy. Their owner changes a block's word before anyone
may write to it, and x86 keeps the order of loads and of stores, so bytes read between two equal words are the bytes that
were announced. (On weaker memory models the digest is what would notice.)
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from core.blocks import BlockRecord
from core.errors import DigestMismatchError, LayoutMismatchError, TransferError
from kvtransfer.arena import Blocks, Generations
from kvtransfer.codec import check_digest
from kvtransfer.spans import coalesce, consecutive
from kvtransfer.transport import BlocksGoneError, PullResult, check_places, check_request

T = TypeVar("T")
_Index = slice | npt.NDArray[np.intp]

INLINE_BYTES_MAX = 2 * 2**20  # copied on the spot: half a millisecond, and a thread is heard of later than that
SHARE_BYTES_MIN = 4 * 2**20  # of one thread: one core does not use up what the memory can do
DIGEST_SPAN_BYTES = 2**20  # copied, then digested while still in the core's cache
PLAIN_SPAN_BYTES = 16 * 2**20  # so long that memcpy goes around the cache, so short that a stop is heard within milliseconds


@dataclass(frozen=True, slots=True)
class Memory:
    """Blocks to read from, with the words that say whether they still are the same blocks."""

    blocks: Blocks
    generations: Generations


@dataclass(frozen=True, slots=True)
class CopyJob:
    source: Memory
    dest: Blocks
    records: Sequence[BlockRecord]
    dest_blocks: Sequence[int]
    digest: bool

    def run(self, stop: Callable[[], bool]) -> None:
        """Copies and checks everything; returns early, with the destination undefined, once `stop()` is true."""
        ids = [record.block_id for record in self.records]
        words = _index(ids), np.array([record.generation for record in self.records], np.uint64)
        self._check_generations(*words)
        try:
            for first, start, dest_start, count in coalesce(ids, self.dest_blocks, self._span_blocks):
                if stop():
                    return
                arrived = self.dest[dest_start : dest_start + count]
                np.copyto(arrived, self.source.blocks[start : start + count])
                if self.digest:
                    for offset in range(count):
                        record = self.records[first + offset]
                        check_digest(arrived[offset], record.digest, record.index)
        except DigestMismatchError:
            self._check_generations(*words)  # bytes of a block that was handed out again are not corrupted, they are another's
            raise
        self._check_generations(*words)

    def parts(self, count: int) -> list[CopyJob]:
        """The same work in so many jobs of about the same size, at most one per block."""
        size = max(1, -(-len(self.records) // count))
        return [
            replace(self, records=self.records[first : first + size], dest_blocks=self.dest_blocks[first : first + size])
            for first in range(0, len(self.records), size)
        ]

    @property
    def _span_blocks(self) -> int:
        span_bytes = DIGEST_SPAN_BYTES if self.digest else PLAIN_SPAN_BYTES
        return max(1, span_bytes // int(self.dest.shape[1]))

    def _check_generations(self, ids: _Index, expected: npt.NDArray[np.uint64]) -> None:
        changed = np.flatnonzero(self.source.generations[ids] != expected)
        if changed.size:
            raise BlocksGoneError([self.records[int(place)].index for place in changed])


def _index(block_ids: Sequence[int]) -> _Index:
    """What picks the blocks' words: of neighbours, as a prompt's blocks mostly are, a slice, which costs a tenth."""
    if block_ids and consecutive(block_ids):
        return slice(block_ids[0], block_ids[-1] + 1)
    return np.array(block_ids, np.intp)


class Copier:
    """Copies into one destination. A small pool of threads, because a large copy would hold up the event loop."""

    def __init__(self, dest: Blocks, *, digest: bool, timeout_s: float, threads: int = 2) -> None:
        self._dest = dest
        self._digest = digest
        self._timeout_s = timeout_s
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="kv-copy")

    async def copy(self, source: Memory, records: Sequence[BlockRecord], dest_blocks: Sequence[int]) -> PullResult:
        """See `Transport.pull`. Cancelled or out of time, it comes back only when no thread writes any more."""
        check_request(records, dest_blocks, self._dest)
        check_places(records, source.blocks.shape[0])
        if source.blocks.shape[1] != self._dest.shape[1]:
            raise LayoutMismatchError(f"block_bytes differs: {self._dest.shape[1]} here, {source.blocks.shape[1]} there")
        started = time.perf_counter()
        job = CopyJob(source, self._dest, records, dest_blocks, self._digest)
        size = len(records) * self._dest.shape[1]
        if size <= INLINE_BYTES_MAX:
            job.run(lambda: False)
        else:
            shares = min(self._threads, max(1, size // SHARE_BYTES_MIN))
            await self._in_threads([part.run for part in job.parts(shares)])
        return PullResult(size, time.perf_counter() - started)

    async def in_thread(self, work: Callable[[Callable[[], bool]], T]) -> T:
        """Runs `work(stop)` in the pool. `stop()` turns true when nobody waits for it any more; `work` then ends soon."""
        [result] = await self._in_threads([work])
        return result

    async def _in_threads(self, works: Sequence[Callable[[Callable[[], bool]], T]]) -> list[T]:
        """All at once. When one of them fails the others are told to stop; returns or raises when none runs any more."""
        stop = threading.Event()
        try:
            futures = [self._pool.submit(work, stop.is_set) for work in works]
        except RuntimeError:
            raise TransferError("the transport is closed") from None
        waiting = [asyncio.wrap_future(future) for future in futures]
        try:
            async with asyncio.timeout(self._timeout_s):
                await asyncio.wait(waiting, return_when=asyncio.FIRST_EXCEPTION)
        except TimeoutError:
            raise TransferError(f"the copy did not end within {self._timeout_s:g} s; raise transfer.pull_timeout_s") from None
        finally:
            stop.set()
            for future in futures:
                future.cancel()  # when no thread has begun with it
            await settled(*waiting)
        errors = [error for one in waiting if not one.cancelled() and (error := one.exception()) is not None]
        if errors:
            raise _worst(errors)
        return [one.result() for one in waiting]

    def close(self) -> None:
        """Refuses new copies; those under way end by themselves within a span."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _worst(errors: Sequence[BaseException]) -> BaseException:
    """Of several parts: all blocks that were found gone; else what was said first."""
    gone = [index for error in errors if isinstance(error, BlocksGoneError) for index in error.indices]
    return BlocksGoneError(gone) if gone else errors[0]


async def settled(*waiting: asyncio.Future[T]) -> None:
    """Waits out threads that were told to stop, however often we are cancelled meanwhile: they must not write later."""
    cancelled: asyncio.CancelledError | None = None
    while not all(future.done() for future in waiting):
        try:
            await asyncio.wait(waiting)
        except asyncio.CancelledError as error:
            cancelled = error
    for future in waiting:
        if not future.cancelled():
            future.exception()  # told to whoever still listened; here nobody does
    if cancelled is not None:
        raise cancelled
