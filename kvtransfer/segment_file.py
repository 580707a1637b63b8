"""One open segment file: whole reads and writes at slots, and the scan that finds its records after a restart."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from core.blocks import KvLayout
from kvtransfer.arena import Blocks
from kvtransfer.segments import EMPTY_SLOT, HEADER_BYTES, SLOT_BYTES, Geometry, SlotHeader, pack_header, read_header, read_slots

READ_ONLY_ERRORS = (errno.EROFS, errno.EACCES, errno.EPERM)
IOV_MAX = 512  # buffers per system call; Linux takes 1024
SUFFIX = ".seg"
START_BYTES = 2**20  # a call to the disk for less would cost more than it hurries
DIRECT_ALIGN = 4096  # of memory, offset and length, wherever O_DIRECT is known
_SYNC_FILE_RANGE_WRITE = 2
_O_DIRECT = getattr(os, "O_DIRECT", 0)


def _sync_file_range() -> Callable[[int, int, int, int], int]:
    """Linux has it and Python does not name it; where there is none, the kernel begins to write when it sees fit."""
    try:
        call = ctypes.CDLL(None).sync_file_range
    except (OSError, AttributeError):
        return lambda fd, offset, length, flags: 0
    call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return call


_start_writing = _sync_file_range()


class FileCalls(Protocol):
    """The system calls that touch a segment's bytes. Raise OSError."""

    def open(self, path: Path, flags: int) -> int: ...

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int: ...

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int: ...

    def start_writing(self, fd: int, offset: int, length: int) -> None:
        """Has the kernel begin to carry these bytes from its cache to the disk, and waits for nothing. Raises nothing."""
        ...


class OsCalls:
    def open(self, path: Path, flags: int) -> int:
        return os.open(path, flags | os.O_CLOEXEC, 0o600)

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        return os.preadv(fd, buffers, offset)

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        return os.pwritev(fd, buffers, offset)

    def start_writing(self, fd: int, offset: int, length: int) -> None:
        _start_writing(fd, offset, length, _SYNC_FILE_RANGE_WRITE)


class SegmentFile:
    """Owner of one descriptor. Pinned by those who read, so that a dropped segment is closed when the last has ended.

    Pins are counted under the owner's lock; reads and writes need none: a slot's bytes never change once it has a record.

    Bytes go past the page cache in both directions where alignment and file system allow: that costs the host neither the
    memory nor the copying, a third of the time on a busy machine. Whoever was just evicted to disk is not asked for again
    soon, and whoever was just read is in memory.
    """

    def __init__(self, path: Path, segment: int, geometry: Geometry, fd: int, calls: FileCalls) -> None:
        self.path, self.segment, self.geometry = path, segment, geometry
        self._fd, self._calls = fd, calls
        self._pins = 0
        self._retired = False
        self._direct_fd = -1  # open while this file is written to
        self._direct_read_fd = -1  # opened with the first read
        self._reads_directly = bool(_O_DIRECT) and geometry.block_bytes % DIRECT_ALIGN == 0
        self._opening = threading.Lock()
        self._writing = threading.Lock()  # what two writers share
        self._cached = (0, 0)  # from where to where bytes were written through the page cache and not yet put on their way

    @classmethod
    def create(cls, directory: Path, segment: int, geometry: Geometry, layout: KvLayout, calls: FileCalls) -> SegmentFile:
        """Raises OSError; nothing is left behind then."""
        path = directory / file_name(segment)
        fd = calls.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        file = cls(path, segment, geometry, fd, calls)
        try:
            file._write_all([memoryview(pack_header(segment, geometry, layout))], 0)
        except BaseException:
            file.remove()
            file.retire()
            raise
        return file

    @classmethod
    def open(cls, path: Path, layout: KvLayout, calls: FileCalls) -> SegmentFile | None:
        """None when the file is no segment of this layout, or not whole enough to be one. Raises OSError."""
        segment = int(path.stem, 16)
        try:
            fd = calls.open(path, os.O_RDWR)
        except OSError as error:
            if error.errno not in READ_ONLY_ERRORS:
                raise
            fd = calls.open(path, os.O_RDONLY)
        try:
            geometry = read_header(os.pread(fd, HEADER_BYTES, 0), segment, layout)
        except BaseException:
            os.close(fd)
            raise
        if geometry is None:
            os.close(fd)
            return None
        return cls(path, segment, geometry, fd, calls)

    def scan(self) -> list[SlotHeader]:
        """Every record whose header holds and whose bytes are inside the file. Raises OSError."""
        slots = self.geometry.slots_within(os.fstat(self._fd).st_size)
        table = os.pread(self._fd, slots * SLOT_BYTES, HEADER_BYTES)
        return list(read_slots(table, self.segment, self.geometry.block_bytes))

    def cut(self, used: int) -> None:
        """Ends the file after slot `used - 1` and clears the headers behind it. Raises OSError."""
        behind = bytes((self.geometry.slots - used) * SLOT_BYTES)
        if behind and any(os.pread(self._fd, len(behind), self.geometry.slot_offset(used))):
            self._write_all([memoryview(behind)], self.geometry.slot_offset(used))
        if os.fstat(self._fd).st_size > self.geometry.bytes_with(used):
            os.ftruncate(self._fd, self.geometry.bytes_with(used))

    def write_bytes(self, first: int, blocks: Sequence[memoryview]) -> None:
        """The bytes of consecutive slots from `first`; two threads at a time may. Raises OSError: nothing of it counts then.

        What went into the page cache is put on its way soon: left to itself the kernel lets it pile up for seconds,
        then floods the disk and halts every writer, this one in front.
        """
        assert first + len(blocks) <= self.geometry.slots, "the segment is full"
        offset, size = self.geometry.data_of(first), len(blocks) * self.geometry.block_bytes
        if self._write_direct(blocks, offset):
            return
        self._write_all(blocks, offset)
        full = first + len(blocks) == self.geometry.slots
        with self._writing:
            start, end = self._cached
            self._cached = start, end = min(start, offset) if end else offset, max(end, offset + size)
            if end - start >= START_BYTES or full:
                self._calls.start_writing(self._fd, start, end - start)
                self._cached = (0, 0)

    def end_writing(self) -> None:
        """Once no slot is left to write and none is being written."""
        self._end_direct()

    def write_headers(self, first: int, headers: Sequence[bytes]) -> None:
        """Makes consecutive slots count, whose bytes are written. Raises OSError."""
        self._write_all([memoryview(b"".join(headers))], self.geometry.slot_offset(first))

    def clear(self, slot: int) -> None:
        """Makes a record count no more, restarts included. Raises OSError."""
        self._write_all([memoryview(EMPTY_SLOT)], self.geometry.slot_offset(slot))

    def read(self, first: int, destinations: Sequence[Blocks]) -> None:
        """The bytes of consecutive slots from `first`. Raises OSError, a file that ends too early included."""
        views = [destination.data for destination in destinations]
        offset, size = self.geometry.data_of(first), len(views) * self.geometry.block_bytes
        if self._read_directly(views, offset) == size:
            return
        if _all(self._calls.preadv, self._fd, views, offset) < size:
            raise OSError(errno.ENODATA, "the segment ends inside a record", str(self.path))

    def pin(self) -> None:
        self._pins += 1

    def unpin(self) -> None:
        self._pins -= 1
        if self._retired and not self._pins:
            self._close()

    def retire(self) -> None:
        """Closes the descriptor, once nobody has it pinned. Called once."""
        assert not self._retired, "closed twice"
        self._retired = True
        self._end_direct()
        if not self._pins:
            self._close()

    def remove(self) -> None:
        """Raises OSError unless the file is gone afterwards."""
        self.path.unlink(missing_ok=True)

    def _close(self) -> None:
        os.close(self._fd)
        if self._direct_read_fd >= 0:
            os.close(self._direct_read_fd)

    def _read_directly(self, views: Sequence[memoryview], offset: int) -> int:
        """Bytes read, none where these destinations, or this file system, want the page cache. Raises OSError."""
        if not self._reads_directly:
            return 0
        with self._opening:
            try:
                if self._direct_read_fd < 0:
                    self._direct_read_fd = self._calls.open(self.path, os.O_RDONLY | _O_DIRECT)
            except OSError:  # dropped while it is read, or no descriptor left
                self._reads_directly = False
                return 0
        try:
            return _all(self._calls.preadv, self._direct_read_fd, views, offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return 0

    def _write_direct(self, blocks: Sequence[memoryview], offset: int) -> bool:
        """False when these bytes, or this file system, have to go through the page cache. Raises OSError as writing does."""
        if not _O_DIRECT or self.geometry.block_bytes % DIRECT_ALIGN:
            return False
        try:
            with self._writing:
                if self._direct_fd < 0:
                    self._direct_fd = self._calls.open(self.path, os.O_WRONLY | _O_DIRECT)
            return _all(self._calls.pwritev, self._direct_fd, blocks, offset) == len(blocks) * self.geometry.block_bytes
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return False

    def _end_direct(self) -> None:
        if self._direct_fd >= 0:
            os.close(self._direct_fd)
            self._direct_fd = -1

    def _write_all(self, buffers: Sequence[memoryview], offset: int) -> None:
        moved = _all(self._calls.pwritev, self._fd, buffers, offset)
        if moved < sum(buffer.nbytes for buffer in buffers):
            raise OSError(errno.EIO, "the disk takes no more bytes and names no reason", str(self.path))


def file_name(segment: int) -> str:
    return f"{segment:016x}{SUFFIX}"


def segment_files(directory: Path) -> list[Path]:
    """Files named like segments, oldest first."""
    return sorted(path for path in directory.glob("*" + SUFFIX) if len(path.stem) == 16 and _is_hex(path.stem))


def _is_hex(stem: str) -> bool:
    return set(stem) <= set("0123456789abcdef")


class _Vector(Protocol):
    def __call__(self, fd: int, buffers: Sequence[memoryview], offset: int, /) -> int: ...


def _all(call: _Vector, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
    """Repeats a vectored call until all is moved or it moves nothing; returns the bytes moved."""
    left, total = list(buffers), 0
    while left:
        moved = call(fd, left[:IOV_MAX], offset + total)
        if moved == 0:
            break
        total += moved
        while left and moved >= left[0].nbytes:
            moved -= left.pop(0).nbytes
        if moved:
            left[0] = left[0][moved:]
    return total
