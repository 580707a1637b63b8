"""The segment files of one layout in one directory, and the index over them: appends, drops, recovery at the start.

One thread appends; any thread may look up, pin, drop and clear. The lock covers the index and the pins and no system call
but the closing of a descriptor.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from core.blocks import BlockKey, KvLayout
from core.errors import ConfigError
from kvtransfer.appending import Appending, Written
from kvtransfer.arena import Blocks
from kvtransfer.codec import digest_of
from kvtransfer.disk_index import DiskIndex, Record
from kvtransfer.disk_stats import DiskStats
from kvtransfer.disk_tenants import DiskTenants
from kvtransfer.segment_file import FileCalls, SegmentFile, segment_files
from kvtransfer.segments import Geometry, SlotHeader, directory_name, pack_slot

log = logging.getLogger(__name__)
PIECE_BYTES = 4 * 2**20  # written at a time
KEEP_BYTES_MAX = 32 * 2**20  # copied out of one segment before it is dropped


class SegmentStore:
    """Open it with `SegmentStore.open`. `writes_off` says why nothing can be written (any more), empty while it can."""

    def __init__(
        self,
        directory: Path,
        layout: KvLayout,
        geometry: Geometry,
        bytes_max: int,
        calls: FileCalls,
        now_s: Callable[[], float],
        tenant_blocks_max: int | None = None,
    ) -> None:
        self.lock = threading.Lock()
        self.index = DiskIndex(bytes_max, tenant_blocks_max)
        self.stats = DiskStats()
        self.writes_off = ""
        self._directory, self._layout, self._geometry = directory, layout, geometry
        self._calls, self._now_s = calls, now_s
        self._tenants = DiskTenants(directory, calls)
        self._files: dict[int, SegmentFile] = {}
        self._active: tuple[SegmentFile, int] | None = None  # where to append, and the next slot
        self._moving: set[BlockKey] = set()  # kept from a dropped segment, not yet written again
        self._newest = 0  # segment number; none is used twice while the directory lives
        self._directory_fd = -1
        # Two: the next piece stands at the disk when one is done, whoever holds the interpreter just then.
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="kv-disk-bytes")

    @classmethod
    def open(
        cls,
        root: Path,
        layout: KvLayout,
        geometry: Geometry,
        bytes_max: int,
        calls: FileCalls,
        now_s: Callable[[], float],
        tenant_blocks_max: int | None = None,
    ) -> SegmentStore:
        """Takes the directory of this layout below `root` for this process and finds what is in it.

        Raises ConfigError when the directory cannot be had, or another process has it.
        """
        directory = root / directory_name(layout)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise ConfigError(f"cannot use {directory} for KV blocks ({error.strerror}); choose another directory") from None
        store = cls(directory, layout, geometry, bytes_max, calls, now_s, tenant_blocks_max)
        store._directory_fd = fd
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            store._recover()
        except BlockingIOError:
            store.close()
            raise ConfigError(f"{directory} is in use by another process; give each store node its own directory") from None
        except OSError as error:
            store.close()
            raise ConfigError(f"cannot read {directory} ({error.strerror}); repair it or choose another directory") from None
        return store

    def append(self, blocks: Sequence[Written], wanted: Callable[[Written], bool]) -> None:
        """Writes blocks and makes findable those still `wanted` (asked under the lock). One thread only. Raises OSError."""
        done = 0
        while done < len(blocks):
            begun = self.begin(blocks[done:])
            self.finish(begun, wanted)
            done += len(begun.blocks)

    @property
    def room_blocks(self) -> int:
        """Of the segment that is open. With none the next `begin` opens another, and nothing may be under way then."""
        return 0 if self._active is None else self._active[0].geometry.slots - self._active[1]

    def begin(self, blocks: Sequence[Written]) -> Appending:
        """Puts the bytes of the first of `blocks` on their way, a piece at most. One thread only. Raises OSError."""
        file, first = self._room()
        count = min(len(blocks), max(1, PIECE_BYTES // self._geometry.block_bytes), file.geometry.slots - first)
        part = blocks[:count]
        self._active = (file, first + count)
        written = self._pool.submit(file.write_bytes, first, [block.bytes.data for block in part])
        return Appending(file, first, part, written, time.perf_counter())

    def finish(self, begun: Appending, wanted: Callable[[Written], bool]) -> None:
        """In the order of `begin`: makes blocks findable that are still `wanted` (asked under the lock). Raises OSError."""
        file, first, blocks = begun.file, begun.first, begun.blocks
        records = self._headed(begun)
        with self.lock:
            self.index.extend(file.segment, first + len(blocks))
            unwanted = [record for block, record in zip(blocks, records, strict=True) if not self._adopt(block, record, wanted)]
        for record in unwanted:
            file.clear(record.slot)
        if first + len(blocks) == file.geometry.slots:
            file.end_writing()
        self.stats.write_seconds.observe(time.perf_counter() - begun.began_s)

    @contextmanager
    def pinned(self, keys: Sequence[BlockKey]) -> Iterator[list[tuple[SegmentFile, Record] | None]]:
        """Where keys are; the files stay readable inside the block, whatever is dropped meanwhile."""
        with self.lock:
            records = [self.index.use(key) for key in keys]
            found = [None if record is None else (self._files[record.segment], record) for record in records]
            files = {place[0].segment: place[0] for place in found if place is not None}
            for file in files.values():
                file.pin()
        try:
            yield found
        finally:
            with self.lock:
                for file in files.values():
                    file.unpin()

    def forget(self, key: BlockKey, only: Record | None = None) -> bool:
        """Drops a record, for good where the disk can still be written. False when it was not there."""
        with self.lock:
            moved = only is None and key in self._moving
            self._moving.discard(key)
            record = self.index.drop(key, only)
            if record is None:
                return moved
            file = self._files[record.segment]
            file.pin()
        try:
            if not self.writes_off:
                file.clear(record.slot)
        except OSError as error:
            self.turn_off(error)
        finally:
            with self.lock:
                file.unpin()
        return True

    def turn_off(self, error: OSError) -> None:
        """No more writes; said once."""
        with self.lock:
            first, self.writes_off = not self.writes_off, self.writes_off or error.strerror or str(error)
            if first:
                self.stats.write_errors += 1
        if first:
            log.error(
                "KV blocks are no longer written to %s: %s; what is there is still read. Make room or repair the disk,"
                " then restart",
                self._directory,
                error,
            )

    def close(self) -> None:
        """Gives files and directory back; reads under way end on their own descriptors. Idempotent."""
        with self.lock:
            for file in self._files.values():
                file.retire()
            self._files.clear()
            self._active = None
            self.index = DiskIndex(0)
            self._pool.shutdown(wait=False)
            self._tenants.close()
            if self._directory_fd >= 0:
                os.close(self._directory_fd)
                self._directory_fd = -1

    # -- appending: the writer's thread ----------------------------------------------------------------------------

    def _headed(self, begun: Appending) -> list[Record]:
        """While a thread keeps the disk busy with bytes, of this piece or the next, this one makes digests and headers."""
        file, first, now_s = begun.file, begun.first, self._now_s()
        try:
            made = [
                Record(file.segment, first + n, digest_of(block.bytes), now_s, block.tenant, block.cost_s)
                for n, block in enumerate(begun.blocks)
            ]
            headers = [self._header(block.key, record) for block, record in zip(begun.blocks, made, strict=True)]
        finally:
            begun.settle()  # whatever comes: the blocks are their owner's again once this is back
        begun.written.result()
        file.write_headers(first, headers)
        return made

    def _header(self, key: BlockKey, record: Record) -> bytes:
        tenant = self._tenants.note(record.tenant)
        header = SlotHeader(record.slot, key, record.digest, record.written_s, tenant, record.cost_s)
        return pack_slot(record.segment, header, self._geometry.block_bytes)

    def _adopt(self, block: Written, record: Record, wanted: Callable[[Written], bool]) -> bool:
        if not wanted(block) or block.key in self.index:  # a second record would outlive an eviction of the first
            return False
        self.index.add(block.key, record)
        return True

    def _room(self) -> tuple[SegmentFile, int]:
        if self._active is None or self._active[1] == self._active[0].geometry.slots:
            self._active = None
            kept = self._make_room(self._geometry.segment_bytes)
            file = SegmentFile.create(self._directory, self._newest + 1, self._geometry, self._layout, self._calls)
            self._newest = file.segment
            with self.lock:
                self._files[file.segment] = file
                self.index.add_segment(file.segment, file.geometry)
            self._active = (file, 0)
            if kept:
                self.append(kept, lambda block: block.key in self._moving)
                with self.lock:
                    self._moving.clear()
                    self.stats.kept_blocks += len(kept)
        return self._active

    def _make_room(self, room_bytes: int) -> list[Written]:
        """Drops segments until there is room; returns copies of what deserves to stay."""
        kept: list[Written] = []
        while True:
            with self.lock:
                victim = self.index.victim(room_bytes)
                if victim is None:
                    return kept
                file = self._files[victim]
                limit = min(self._geometry.slots // 2, KEEP_BYTES_MAX // self._geometry.block_bytes) - len(kept)
                places = [(key, self.index.find(key)) for key in self.index.worth_keeping(victim, max(0, limit))]
            copies = [(key, record, self._copy(file, record)) for key, record in places if record is not None]
            file.remove()
            with self.lock:
                still = [
                    Written(key, copy, record.tenant, record.cost_s)
                    for key, record, copy in copies
                    if copy is not None and key in self.index
                ]
                self._moving.update(block.key for block in still)
                kept += still
                gone = self.index.drop_segment(victim)
                self._files.pop(victim).retire()
                self.stats.note_dropped(gone, self._now_s())

    def _copy(self, file: SegmentFile, record: Record) -> Blocks | None:
        copy = np.empty(self._geometry.block_bytes, np.uint8)
        try:
            file.read(record.slot, [copy])
        except OSError:
            return None
        return copy if digest_of(copy) == record.digest else None

    # -- recovery: before anybody else is there --------------------------------------------------------------------

    def _recover(self) -> None:
        """Scans every file, newest last. What cannot be repaired for want of writing is left out of the index instead."""
        if not os.access(self._directory, os.W_OK, effective_ids=True):
            self.turn_off(OSError(errno.EROFS, "the directory is read-only or belongs to another user"))
        try:
            self._tenants.read()
        except OSError as error:
            log.warning("whose the blocks in %s are cannot be read (%s); they are nobody's", self._directory, error)
        stale: list[Record] = []
        for path in segment_files(self._directory):
            self._newest = max(self._newest, int(path.stem, 16))
            try:
                stale += self._adopt_file(path)
            except OSError as error:  # one bad file takes its own blocks along, not the tier
                self.stats.read_errors += 1
                log.warning("%s cannot be read (%s); its blocks are left out", path, error)
        for record in stale:
            self._repair(partial(self._files[record.segment].clear, record.slot))
        self._repair(self._trim)
        if not self.writes_off:
            self._tenants.keep(self.index.tenants())

    def _adopt_file(self, path: Path) -> list[Record]:
        """Adds a file's records; returns those elsewhere that they replace. Raises OSError: nothing was added."""
        file = SegmentFile.open(path, self._layout, self._calls)
        if file is None:
            self._repair(path.unlink)
            return []
        try:
            slots = file.scan()
        except OSError:
            file.retire()
            raise
        self._files[file.segment] = file
        used = slots[-1].slot + 1 if slots else 0
        self._repair(partial(file.cut, used))
        self.index.add_segment(file.segment, file.geometry, used)
        stale = [old for slot in slots if (old := self.index.find(slot.key)) is not None]
        for slot in slots:
            tenant = self._tenants.name(slot.tenant_number)
            self.index.add(
                slot.key, Record(file.segment, slot.slot, slot.digest, slot.written_s, tenant, max(0.0, slot.cost_s))
            )
        self._active = (file, used)
        return stale

    def _trim(self) -> None:
        """A bound that was lowered holds from the start."""
        self._make_room(0)
        if self._active is not None and self._active[0].segment not in self._files:
            self._active = None

    def _repair(self, work: Callable[[], object]) -> None:
        if self.writes_off:
            return
        try:
            work()
        except OSError as error:
            self.turn_off(error)
