"""An arena in a file that other processes of the host map read-only: the source of one-copy hand-offs.

File: one header page, a generation word (uint64, native order) per block, then the blocks, both page-aligned. The owner
holds an exclusive `flock` on the file for as long as it lives. The kernel lets go of that lock however the owner dies
(SIGKILL included) and it does not depend on pids, which mean nothing between containers that share /dev/shm: so a file
whose lock can be had belongs to nobody and may be removed.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import re
import stat
import struct
from pathlib import Path

import numpy as np

from core.errors import ConfigError, StaleEpochError, TransferError
from kvtransfer.arena import Arena, Blocks, Generations, check_shape

log = logging.getLogger(__name__)

PREFIX = "tandem-"
_MAGIC = b"TandemKV"
_VERSION = 1
_HEADER = struct.Struct("<8sIIQQQQQ")  # magic, version, pid, epoch, num_blocks, block_bytes, generations at, blocks at
_PAGE = mmap.PAGESIZE
_MAP_POPULATE = getattr(mmap, "MAP_POPULATE", 0)


class SharedArena(Arena):
    """Created by the owner of the blocks. The whole file is allocated and faulted in before this returns."""

    def __init__(self, directory: str, name: str, epoch: int, num_blocks: int, block_bytes: int) -> None:
        """Makes `directory/tandem-NAME-EPOCH-PID`. Raises ConfigError when the directory cannot hold it."""
        check_shape(num_blocks, block_bytes)
        generations_at, blocks_at, total = _offsets(num_blocks, block_bytes)
        self.epoch = epoch
        self.path = os.path.join(directory, f"{PREFIX}{_clean(name)}-{epoch}-{os.getpid()}")
        self._fd = _create_locked(self.path)
        try:
            _allocate(self._fd, self.path, total)
            header = _HEADER.pack(_MAGIC, _VERSION, os.getpid(), epoch, num_blocks, block_bytes, generations_at, blocks_at)
            os.pwrite(self._fd, header, 0)
            memory = mmap.mmap(self._fd, total, mmap.MAP_SHARED | _MAP_POPULATE)
        except BaseException:
            self.close()
            raise
        super().__init__(*_views(memory, num_blocks, block_bytes))

    def close(self) -> None:
        if self._fd < 0:
            return
        _unlink(self.path)
        os.close(self._fd)
        self._fd = -1


class MappedArena:
    """Another process's SharedArena. Unmapped when the last view of it is gone.

    Seen read-only, but for the helper process of a worker, which fills the worker's own blocks.
    """

    def __init__(self, path: str, epoch: int, directory: str, *, writable: bool = False) -> None:
        """Raises TransferError when `path` is gone or no arena of ours in `directory`, StaleEpochError for another epoch.

        The path comes from a peer: only regular files of our own user, straight inside `directory`, are mapped.
        """
        if os.path.dirname(path) != directory.rstrip("/") or not os.path.basename(path).startswith(PREFIX):
            raise TransferError(f"{path} is not an arena in {directory}; set transfer.shm_dir alike on all workers")
        fd = _open_own(path, os.O_RDWR if writable else os.O_RDONLY)
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        try:
            num_blocks, block_bytes, total = _read_header(fd, path, epoch)
            memory = mmap.mmap(fd, total, mmap.MAP_SHARED | _MAP_POPULATE, protection)
        except OSError as error:
            raise TransferError(f"cannot map {path}: {error.strerror}") from None
        finally:
            os.close(fd)
        self.path = path
        self.epoch = epoch
        self.blocks: Blocks
        self.generations: Generations
        self.blocks, self.generations = _views(memory, num_blocks, block_bytes)


def remove_stale(directory: str) -> list[str]:
    """Removes the arenas of dead owners, whoever they were; never one whose owner lives. Returns the removed paths."""
    removed = []
    for path in sorted(Path(directory).glob(PREFIX + "*")):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:  # gone meanwhile, or another user's
            continue
        try:
            if _is_ours(fd) and _lock(fd):
                _unlink(str(path))  # while we hold the lock: a newcomer with this name waits for us and starts afresh
                removed.append(str(path))
        finally:
            os.close(fd)
    if removed:
        log.warning("removed %d arenas of dead workers: %s", len(removed), ", ".join(removed))
    return removed


def _offsets(num_blocks: int, block_bytes: int) -> tuple[int, int, int]:
    generations_at = _PAGE
    blocks_at = generations_at + _round_up(num_blocks * 8)
    return generations_at, blocks_at, blocks_at + num_blocks * block_bytes


def _round_up(size: int) -> int:
    return -(-size // _PAGE) * _PAGE


def _views(memory: mmap.mmap, num_blocks: int, block_bytes: int) -> tuple[Blocks, Generations]:
    generations_at, blocks_at, _ = _offsets(num_blocks, block_bytes)
    blocks = np.frombuffer(memory, np.uint8, num_blocks * block_bytes, blocks_at).reshape(num_blocks, block_bytes)
    return blocks, np.frombuffer(memory, np.uint64, num_blocks, generations_at)


def _clean(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.]+", "_", name)[:64] or "worker"


def _create_locked(path: str) -> int:
    """A new, empty file at `path` that we hold the lock of."""
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            if not os.path.dirname(path) or path not in remove_stale(os.path.dirname(path)):
                raise ConfigError(f"{path} belongs to a live worker; give each worker its own id or epoch") from None
            continue
        except OSError as error:
            raise ConfigError(
                f"cannot create {path} ({error.strerror}); set transfer.shm_dir to a writable memory file system,"
                " or transfer.transport to grpc to do without"
            ) from None
        fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:  # else a cleaner took our file for a dead one's before we had the lock
            return fd
        os.close(fd)


def _allocate(fd: int, path: str, total: int) -> None:
    """Takes every page now: a memory file system that fills up later would kill us with SIGBUS in mid-request."""
    disk = os.fstatvfs(fd)
    free = disk.f_bavail * disk.f_frsize
    try:
        if total > free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.posix_fallocate(fd, 0, total)
    except OSError as error:
        raise ConfigError(
            f"{path} needs {total} bytes and {os.path.dirname(path)} has {free} free ({error.strerror}); lower"
            " engine.kv_bytes, enlarge that file system (docker: --shm-size), point transfer.shm_dir elsewhere,"
            " or set transfer.transport to grpc to do without shared memory"
        ) from None


def _open_own(path: str, mode: int) -> int:
    try:
        fd = os.open(path, mode | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise TransferError(f"cannot open the arena {path}: {error.strerror}; its owner is gone or elsewhere") from None
    if not _is_ours(fd):
        os.close(fd)
        raise TransferError(f"{path} is not a regular file of our own user; refusing to map it")
    return fd


def _is_ours(fd: int) -> bool:
    status = os.fstat(fd)
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()


def _read_header(fd: int, path: str, epoch: int) -> tuple[int, int, int]:
    raw = os.pread(fd, _HEADER.size, 0)
    if len(raw) < _HEADER.size:
        raise TransferError(f"{path} has no arena header")
    magic, version, _pid, found, num_blocks, block_bytes, *_ = _HEADER.unpack(raw)
    if magic != _MAGIC or version != _VERSION:
        raise TransferError(f"{path} is not an arena of this version of tandem; run the same version everywhere")
    if found != epoch:
        raise StaleEpochError(f"{path} is of epoch {found}, the ticket of epoch {epoch}")
    _, _, total = _offsets(num_blocks, block_bytes)
    if os.fstat(fd).st_size < total:  # reading past the end would be SIGBUS
        raise TransferError(f"{path} is shorter than its header says")
    return num_blocks, block_bytes, total


def _lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
