"""The one thread that writes blocks to disk, and the bounded memory in which they wait for it.

A put copies the block into a free staging span and returns; with none free it is dropped and counted. So a put costs one
copy of one block, whatever the disk does, and memory stays at what was set aside at the start.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from core.blocks import BlockKey
from kvtransfer.appending import Appending, Written
from kvtransfer.arena import Blocks, HostArena
from kvtransfer.segment_store import PIECE_BYTES, SegmentStore

AHEAD = 3  # pieces under way at a time: the disk has its next one before headers and index know of the last
LINGER_S = 0.002  # for a piece to fill: a step's blocks arrive together


@dataclass(frozen=True, slots=True)
class _Staged(Written):
    span: int


class DiskWriter:
    """`put` and `forget` from any thread. Its thread ends with `close`, or with the process."""

    def __init__(self, store: SegmentStore, block_bytes: int, queue_blocks: int) -> None:
        self._store = store
        self._piece_blocks = max(1, min(queue_blocks // 2, PIECE_BYTES // block_bytes))
        self._spans: Blocks = HostArena(queue_blocks, block_bytes).bytes_view()
        self._free = list(range(queue_blocks))
        self._queue: deque[_Staged] = deque()  # at most queue_blocks
        self._wanted: dict[BlockKey, int] = {}  # the span a key waits in; no entry: forgotten while it waited
        self._changed = threading.Condition()
        self._closed = False
        self._draining = 0  # how many wait for the queue to be empty
        self._thread = threading.Thread(target=self._run, name="kv-disk-writer", daemon=True)
        self._thread.start()

    def put(self, key: BlockKey, block: Blocks, tenant: bytes, cost_s: float) -> bool:
        """Takes a copy. False when it will not be written: writes are off, or too many wait."""
        stats = self._store.stats
        with self._changed:
            if self._closed or self._store.writes_off:
                stats.put_off += 1
                return False
            if key in self._wanted or key in self._store.index:
                stats.put_known += 1
                return True
            if not self._free:
                stats.put_queue_full += 1
                return False
            span = self._free.pop()
            self._wanted[key] = span
        np.copyto(self._spans[span], block)
        with self._changed:
            self._queue.append(_Staged(key, self._spans[span], tenant, cost_s, span))
            if len(self._queue) in (1, self._piece_blocks):  # what its thread waits for; waking it for each costs both
                self._changed.notify_all()
        return True

    def forget(self, key: BlockKey) -> bool:
        """A block that waits is not made findable. Call it before the store's own `forget`."""
        with self._changed:
            return self._wanted.pop(key, None) is not None

    def drain(self, timeout_s: float) -> bool:
        """Blocks until everything put so far is written or given up; False when that took too long."""
        with self._changed:
            self._draining += 1
            self._changed.notify_all()
            try:
                return self._changed.wait_for(lambda: len(self._free) == len(self._spans), timeout_s)
            finally:
                self._draining -= 1

    def close(self, timeout_s: float) -> bool:
        """Refuses puts, writes what waits and ends the thread; False when that took too long. Idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        under_way: deque[Appending] = deque()
        while True:
            room = self._store.room_blocks
            busy = len(under_way) == AHEAD or (under_way and not room)
            if not busy and (piece := self._next_piece(room or self._piece_blocks, waits=not under_way)):
                self._begin(piece, under_way)
            elif under_way:
                self._finish(under_way.popleft())
            else:
                return

    def _begin(self, piece: list[_Staged], under_way: deque[Appending]) -> None:
        try:
            if not self._store.writes_off:
                begun = self._store.begin(piece)
                under_way.append(begun)
                self._put_back(piece[len(begun.blocks) :])
                return
        except OSError as error:
            self._store.turn_off(error)
        self._give_back(piece)

    def _finish(self, begun: Appending) -> None:
        try:
            if not self._store.writes_off:
                self._store.finish(begun, self._take)
        except OSError as error:
            self._store.turn_off(error)
        finally:
            begun.settle()
            self._give_back(begun.blocks)

    def _next_piece(self, blocks_max: int, *, waits: bool) -> list[_Staged]:
        """Waits for work, or takes what is worth it now. Empty when there is none; after waiting: there will be none."""
        with self._changed:
            if waits:
                self._changed.wait_for(lambda: self._queue or self._closed)
                self._changed.wait_for(self._worth_writing, LINGER_S)
            elif not self._worth_writing():
                return []
            return [self._queue.popleft() for _ in range(min(len(self._queue), self._piece_blocks, blocks_max))]

    def _put_back(self, rest: list[_Staged]) -> None:
        """What a new segment has no room for waits for the one after it."""
        with self._changed:
            self._queue.extendleft(reversed(rest))

    def _worth_writing(self) -> bool:
        return len(self._queue) >= self._piece_blocks or self._closed or self._draining > 0

    def _take(self, block: Written) -> bool:
        """Whether a block that was just written is still wanted; called under the store's lock."""
        assert isinstance(block, _Staged)
        with self._changed:
            if self._wanted.get(block.key) != block.span:
                return False
            del self._wanted[block.key]
        self._store.stats.put_blocks += 1
        self._store.stats.put_bytes += block.bytes.nbytes
        return True

    def _give_back(self, blocks: Sequence[Written]) -> None:
        with self._changed:
            for block in blocks:
                assert isinstance(block, _Staged)
                if self._wanted.get(block.key) == block.span:
                    del self._wanted[block.key]
                self._free.append(block.span)
            self._changed.notify_all()
