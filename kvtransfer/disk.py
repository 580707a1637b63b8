"""The disk tier: blocks by their key in append-only segment files, bounded in size, whole or not there at all.

    put ── copy ──▶ staging ── writer's thread ──▶ segments ── reader threads, digest checked ──▶ get

After a kill at any byte the next start serves what was written whole and cuts off the rest; bytes of a record are checked
against its digest on every read, so a power cut that lost pages costs blocks, never a wrong byte. Nothing is synced: it
is a cache. A disk that cannot be written (full, read-only, broken) turns writes off until a restart; reads go on.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from prometheus_client.core import Metric

from core.blocks import BlockKey, KvLayout
from core.errors import ConfigError, TransferError
from kvtransfer.arena import Blocks
from kvtransfer.codec import digest_of
from kvtransfer.disk_index import Record
from kvtransfer.disk_stats import DiskStats, disk_metrics
from kvtransfer.disk_writer import DiskWriter
from kvtransfer.segment_file import FileCalls, OsCalls, SegmentFile
from kvtransfer.segment_store import SegmentStore
from kvtransfer.segments import geometry_for

T = TypeVar("T")

SPAN_BYTES = 2**20  # read, then digested while still in the core's cache
SEGMENT_BYTES = 64 * 2**20
SEGMENTS_MAX = 128  # of a large tier: each holds a descriptor


@dataclass(frozen=True, slots=True)
class DiskOptions:
    """`queue_bytes` wait in memory for the writer. `timeout_s` bounds every call; `now_s` is unix time.

    `tenant_share` is the part of the bound beyond which a tenant's blocks are dropped before those of others.
    """

    queue_bytes: int = 64 * 2**20
    segment_bytes: int = SEGMENT_BYTES
    read_threads: int = 2
    timeout_s: float = 30.0
    tenant_share: float = 1.0
    now_s: Callable[[], float] = time.time
    calls: FileCalls = OsCalls()  # noqa: RUF009 - it has no state


class VerifyReport(NamedTuple):
    checked: int
    dropped: int


@dataclass(frozen=True, slots=True)
class _Span:
    """Consecutive slots of one file and where they go; `places` are their positions in the caller's list."""

    file: SegmentFile
    records: list[Record]
    places: list[int]


class DiskTier:
    """Blocks of one layout below one directory, which belongs to this process until `close`.

    `put`, `contains`, `keys` and `stats` from any thread; the coroutines on an event loop.
    """

    def __init__(self, store: SegmentStore, writer: DiskWriter, layout: KvLayout, options: DiskOptions) -> None:
        self._store, self._writer = store, writer
        self._block_bytes = layout.block_bytes
        self._options = options
        self._pool = ThreadPoolExecutor(options.read_threads, thread_name_prefix="kv-disk-reader")

    @classmethod
    def open(cls, directory: Path, layout: KvLayout, bytes_max: int, options: DiskOptions | None = None) -> DiskTier:
        """Finds what an earlier process left. Blocking: one read per segment file.

        Blocks of other fingerprints, layouts and format versions live in directories of their own beside it; `bytes_max`
        counts this one's. Raises ConfigError when the bound is too small, the directory cannot be had or is in use.
        """
        options = options or DiskOptions()
        block_bytes = layout.block_bytes
        geometry = geometry_for(block_bytes, bytes_max, max(options.segment_bytes, bytes_max // SEGMENTS_MAX))
        if geometry is None:
            raise ConfigError(f"{bytes_max} bytes of disk hold no two KV blocks of {block_bytes} bytes; raise the bound")
        room_blocks = bytes_max // geometry.segment_bytes * geometry.slots
        share = max(1, int(room_blocks * options.tenant_share)) if options.tenant_share < 1 else None
        store = SegmentStore.open(directory, layout, geometry, bytes_max, options.calls, options.now_s, share)
        queue_blocks = max(2, options.queue_bytes // block_bytes)
        return cls(store, DiskWriter(store, block_bytes, queue_blocks), layout, options)

    def put(self, key: BlockKey, block: Blocks, tenant: bytes = b"", cost_s: float = 0.0) -> bool:
        """Takes a copy of `block` (uint8 [block_bytes], contiguous) and returns; it is written, and findable, a little later.

        `tenant`, whose it is, and `cost_s`, what computing it again takes, are kept with it; see `DiskTenants` for bounds.
        True when the key is there or on its way. False when it was dropped, and counted: too many wait, or writes are off.
        """
        assert block.nbytes == self._block_bytes, f"a block of {block.nbytes} bytes for {self._block_bytes}"
        return self._writer.put(key, block, tenant, cost_s)

    async def get(self, keys: Sequence[BlockKey], destinations: Sequence[Blocks]) -> list[bool]:
        """Reads each key's bytes straight into its destination (writable, contiguous uint8 [block_bytes]).

        False: not there, or no longer whole; that destination's bytes are undefined then. Cancelled or out of time
        (TransferError), it comes back only when no thread writes into a destination any more.
        """
        assert len(keys) == len(destinations), "every key has one destination"
        assert all(d.nbytes == self._block_bytes for d in destinations), "a destination is one block"
        started = time.perf_counter()
        with self._store.pinned(keys) as found:
            job = _Reading(self._store, keys, destinations, _spans(found, max(1, SPAN_BYTES // self._block_bytes)))
            await self._run(job.run, min(self._options.read_threads, len(job.spans)))
        stats, hits = self._store.stats, sum(job.whole)
        stats.get_hits += hits
        stats.get_misses += len(keys) - hits
        stats.get_bytes += hits * self._block_bytes
        stats.read_seconds.observe(time.perf_counter() - started)
        return job.whole

    def contains(self, keys: Sequence[BlockKey]) -> list[bool]:
        """Whether each key can be read now; what waits to be written cannot."""
        with self._store.lock:
            return [key in self._store.index for key in keys]

    def keys(self) -> list[BlockKey]:
        with self._store.lock:
            return list(self._store.index)

    def find(self, keys: Sequence[BlockKey]) -> list[Record | None]:
        """What is known of each key, None where it is not here. No use: what stays longest does not change."""
        with self._store.lock:
            return [self._store.index.find(key) for key in keys]

    def records(self) -> list[tuple[BlockKey, Record]]:
        with self._store.lock:
            return self._store.index.items()

    def now_s(self) -> float:
        """Unix time, by the clock that tells when blocks were written."""
        return self._options.now_s()

    async def evict(self, key: BlockKey) -> bool:
        """Forgets a block, across restarts too (while writes are on). False when it was not there."""
        waited = self._writer.forget(key)
        [gone] = await self._run(lambda stop: self._store.forget(key), 1)
        self._store.stats.evicted_blocks += waited or gone
        return waited or gone

    async def verify(self) -> VerifyReport:
        """Reads every block and drops those that are not whole. Slow by nature: a span at a time, between other reads."""
        scratch = np.empty((max(1, SPAN_BYTES // self._block_bytes), self._block_bytes), np.uint8)
        checked = dropped = 0
        with self._store.lock:
            order = [key for segment in self._store.index.segments for key in self._store.index.keys_of(segment)]
        for start in range(0, len(order), len(scratch)):
            keys = order[start : start + len(scratch)]
            there = self.contains(keys)
            whole = await self.get(keys, list(scratch[: len(keys)]))
            checked += sum(there)
            dropped += sum(was and not now for was, now in zip(there, whole, strict=True))
        return VerifyReport(checked, dropped)

    async def flush(self) -> bool:
        """Waits until what was put is written or given up; False when that takes longer than `timeout_s`."""
        return await asyncio.to_thread(self._writer.drain, self._options.timeout_s)

    @property
    def stats(self) -> DiskStats:
        return self._store.stats

    @property
    def writes_off(self) -> str:
        """Why nothing is written any more; empty while writes are on."""
        return self._store.writes_off

    @property
    def disk_bytes(self) -> int:
        with self._store.lock:
            return self._store.index.bytes

    def collect(self) -> Iterable[Metric]:
        with self._store.lock:
            blocks, disk_bytes = len(self._store.index), self._store.index.bytes
        return disk_metrics(self.stats, blocks=blocks, disk_bytes=disk_bytes, writes_off=bool(self.writes_off))

    async def close(self) -> None:
        """Writes what waits (for at most `timeout_s`), then gives threads, files and directory back. Idempotent."""
        written = await asyncio.to_thread(self._writer.close, self._options.timeout_s)
        self._pool.shutdown(wait=False)
        if written:  # else its thread still uses them; they end with the process
            self._store.close()

    async def _run(self, work: Callable[[Callable[[], bool]], T], threads: int) -> list[T]:
        """`work(stop)` in `threads` reader threads. However this ends, none of them works on afterwards."""
        stop = threading.Event()
        try:
            futures = [self._pool.submit(work, stop.is_set) for _ in range(threads)]
        except RuntimeError:
            raise TransferError("the disk tier is closed") from None
        waiting = [asyncio.wrap_future(future) for future in futures]
        try:
            async with asyncio.timeout(self._options.timeout_s):
                return [await asyncio.shield(one) for one in waiting]
        except TimeoutError:
            raise TransferError(f"the disk did not answer within {self._options.timeout_s:g} s") from None
        finally:
            stop.set()
            await _settled(futures, waiting)


class _Reading:
    """One get, shared by the threads that carry it out."""

    def __init__(
        self, store: SegmentStore, keys: Sequence[BlockKey], destinations: Sequence[Blocks], spans: Sequence[_Span]
    ) -> None:
        self.spans = deque(spans)
        self.whole = [False] * len(keys)
        self._store, self._keys, self._destinations = store, keys, destinations

    def run(self, stop: Callable[[], bool]) -> None:
        while not stop():
            try:
                span = self.spans.popleft()
            except IndexError:
                return
            self._read(span)

    def _read(self, span: _Span) -> None:
        try:
            span.file.read(span.records[0].slot, [self._destinations[place] for place in span.places])
        except OSError:
            self._read_singly(span)
            return
        for record, place in zip(span.records, span.places, strict=True):
            self._check(record, place)

    def _read_singly(self, span: _Span) -> None:
        """One bad sector takes one block with it, not its neighbours."""
        for record, place in zip(span.records, span.places, strict=True):
            try:
                span.file.read(record.slot, [self._destinations[place]])
            except OSError:
                self._drop(record, place, "read_errors")
            else:
                self._check(record, place)

    def _check(self, record: Record, place: int) -> None:
        if digest_of(self._destinations[place]) == record.digest:
            self.whole[place] = True
        else:
            self._drop(record, place, "corrupt_blocks")

    def _drop(self, record: Record, place: int, why: Literal["read_errors", "corrupt_blocks"]) -> None:
        if self._store.forget(self._keys[place], record):
            with self._store.lock:
                setattr(self._store.stats, why, getattr(self._store.stats, why) + 1)


def _spans(found: Sequence[tuple[SegmentFile, Record] | None], blocks_max: int) -> list[_Span]:
    """What was found, in the order it has on disk, cut into runs of neighbours."""
    order = sorted((place.segment, record.slot, n, place, record) for n, it in enumerate(found) if it for place, record in [it])
    spans: list[_Span] = []
    for segment, slot, n, file, record in order:
        last = spans[-1] if spans else None
        if last and last.records[-1][:2] == (segment, slot - 1) and len(last.records) < blocks_max:
            last.records.append(record)
            last.places.append(n)
        else:
            spans.append(_Span(file, [record], [n]))
    return spans


async def _settled(futures: Sequence[Future[T]], waiting: Sequence[asyncio.Future[T]]) -> None:
    """Waits out threads that were told to stop, however often we are cancelled meanwhile: they must not write later."""
    for future in futures:
        future.cancel()  # those that no thread has begun with
    cancelled: asyncio.CancelledError | None = None
    while not all(one.done() for one in waiting):
        try:
            await asyncio.wait(waiting)
        except asyncio.CancelledError as error:
            cancelled = error
    for one in waiting:
        if not one.cancelled():
            one.exception()  # told to whoever still listened
    if cancelled is not None:
        raise cancelled
