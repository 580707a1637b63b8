"""Small blocks whose bytes follow from their key, disk tiers of them, and a disk that fails when it is told to."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np

from core.blocks import BlockKey, KvLayout
from kvtransfer.arena import Blocks
from kvtransfer.disk import DiskOptions, DiskTier
from kvtransfer.segment_file import OsCalls

LAYOUT = KvLayout(b"\x17" * 16, "float32", 1, 1, 4, 2)
BLOCK_BYTES = LAYOUT.block_bytes  # 64
ROOMY = 2**20
TIGHT = 4 * (8192 + 8 * BLOCK_BYTES)


def key(n: int) -> BlockKey:
    return sha256(n.to_bytes(8, "big", signed=True)).digest()[:16]


def block(of: BlockKey, layout: KvLayout = LAYOUT) -> Blocks:
    repeated = sha256(of).digest() * (layout.block_bytes // 32)
    return np.frombuffer(repeated, np.uint8).copy()


def tier(directory: Path, bytes_max: int = ROOMY, **options: object) -> DiskTier:
    return DiskTier.open(directory, LAYOUT, bytes_max, DiskOptions(**{"queue_bytes": 4096, "timeout_s": 20.0, **options}))  # type: ignore[arg-type]


async def put_all(disk: DiskTier, numbers: Sequence[int]) -> None:
    """One after the other, each written before the next: the queue's bound plays no part."""
    for n in numbers:
        assert disk.put(key(n), block(key(n)))
        assert await disk.flush()


async def served(disk: DiskTier, numbers: Sequence[int]) -> list[int]:
    """Which of them are served; asserts that what is served is whole."""
    keys = [key(n) for n in numbers]
    out = np.zeros((len(keys), BLOCK_BYTES), np.uint8)
    there = await disk.get(keys, list(out))
    for n, got, is_there in zip(numbers, out, there, strict=True):
        assert not is_there or np.array_equal(got, block(key(n))), f"block {n} is served with other bytes"
    return [n for n, is_there in zip(numbers, there, strict=True) if is_there]


def segment_paths(directory: Path) -> list[Path]:
    return sorted(directory.glob("*/*.seg"))


class FailingCalls(OsCalls):
    """The real calls, until `budget_bytes` were written (then what fits is written, as a full disk does), or reads break."""

    def __init__(self, budget_bytes: int = 2**40, error: int = errno.ENOSPC) -> None:
        self.budget_bytes, self.error = budget_bytes, error
        self.read_error_at: tuple[int, int] | None = None  # a range of offsets that cannot be read

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        size = sum(buffer.nbytes for buffer in buffers)
        if size <= self.budget_bytes:
            self.budget_bytes -= size
            return super().pwritev(fd, buffers, offset)
        fits, self.budget_bytes = self.budget_bytes, 0
        if not fits:
            raise OSError(self.error, os.strerror(self.error))
        return super().pwritev(fd, [memoryview(b"".join(buffers))[:fits]], offset)

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if self.read_error_at is not None:
            first, last = self.read_error_at
            if offset <= last and offset + sum(buffer.nbytes for buffer in buffers) > first:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().preadv(fd, buffers, offset)
