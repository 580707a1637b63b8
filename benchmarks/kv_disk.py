"""The disk tier against plain file writes and reads of the same bytes, on the same disk, in turns.

Claims
- From and to the disk itself, put and get move at least 0.7 of what pwritev and preadv of the same blocks in the same span
  size get, digest, index and the copy into staging included: writes until fdatasync is back, reads with nothing cached.
- The same within the page cache, what a put costs its caller, and the time to find 10,000 blocks after a restart are stated.

Plain files are written and read by one thread, as dd does it; the tier reads with two.

    python -m benchmarks.kv_disk [--quick] [--json FILE] [--dir DIRECTORY]
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np

from benchmarks.rows import Row, arguments, report
from core.blocks import KEY_BYTES, KvLayout
from kvtransfer.arena import Blocks, HostArena
from kvtransfer.disk import BATCH_BYTES, SPAN_BYTES, DiskOptions, DiskTier

LAYOUT = KvLayout(b"bench" + bytes(11), "float32", 6, 2, 64, 16)  # the demo model's: 96 KiB
BLOCK_BYTES = LAYOUT.block_bytes
MIB = 2**20
SIZES_MIB = (16, 64)
SMALL = KvLayout(b"small" + bytes(11), "float32", 1, 1, 16, 16)


class Speeds(NamedTuple):
    """GB/s, in the order they are measured. Warm: in the page cache, cold: from and to the disk."""

    warm_put: float
    cold_put: float
    warm_write: float
    cold_write: float
    cold_get: float
    warm_get: float
    cold_read: float
    warm_read: float


def settle(directory: Path, pattern: str) -> None:
    """Everything on the disk and nothing of it in memory."""
    for path in directory.glob(pattern):
        fd = os.open(path, os.O_RDONLY)
        os.fdatasync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def write_file(path: Path, blocks: Blocks) -> None:
    """The same blocks in spans of the tier's batch size, straight from memory."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    step = BATCH_BYTES // BLOCK_BYTES
    for first in range(0, len(blocks), step):
        os.pwritev(fd, [block.data for block in blocks[first : first + step]], first * BLOCK_BYTES)
    os.close(fd)


def read_file(path: Path, out: Blocks) -> None:
    fd = os.open(path, os.O_RDONLY)
    step = SPAN_BYTES // BLOCK_BYTES
    for first in range(0, len(out), step):
        os.preadv(fd, [block.data for block in out[first : first + step]], first * BLOCK_BYTES)
    os.close(fd)


async def one_round(disk: DiskTier, directory: Path, keys: list[bytes], source: Blocks, out: Blocks) -> list[float]:
    """Seconds of each of `Speeds`."""
    path = directory / "plain"
    path.unlink(missing_ok=True)
    marks = [time.perf_counter()]

    def mark() -> float:
        marks.append(time.perf_counter())
        return marks[-1] - marks[-2]

    assert all(disk.put(key, block) for key, block in zip(keys, source, strict=True))
    assert await disk.flush()
    put = mark()
    settle(directory, "*/*.seg")
    put_synced = put + mark()
    write_file(path, source)
    written = mark()
    settle(directory, "plain")
    written_synced = written + mark()
    gets, reads = [], []
    for _ in ("cold", "warm"):
        assert all(await disk.get(keys, list(out)))
        gets.append(mark())
        read_file(path, out)
        reads.append(mark())
    return [put, put_synced, written, written_synced, *gets, *reads]


async def one_size(directory: Path, mib: int, rounds: int) -> Speeds:
    count = mib * MIB // BLOCK_BYTES
    source, out = (HostArena(count, BLOCK_BYTES).bytes_view() for _ in range(2))
    source[:] = np.random.default_rng(0).integers(0, 256, source.shape, np.uint8)
    disk = DiskTier.open(directory, LAYOUT, 2 * (rounds + 2) * mib * MIB, DiskOptions(queue_bytes=2 * mib * MIB))
    taken = []
    for number in range(rounds + 1):
        keys = [(number * count + n).to_bytes(KEY_BYTES, "big") for n in range(count)]
        taken.append(await one_round(disk, directory, keys, source, out))
    await disk.close()
    size = count * BLOCK_BYTES / 1e9
    return Speeds(*(size / median(column) for column in zip(*taken[1:], strict=True)))  # the first one warms all up


async def put_us(directory: Path) -> tuple[float, float]:
    """Median (put, copy of the block) as the caller sees them, in microseconds."""
    source = HostArena(256, BLOCK_BYTES).bytes_view()
    dest = HostArena(256, BLOCK_BYTES).bytes_view()
    disk = DiskTier.open(directory, LAYOUT, 256 * MIB, DiskOptions(queue_bytes=64 * MIB))
    puts, copies = [], []
    for n, block in enumerate(source):
        started = time.perf_counter()
        disk.put(n.to_bytes(KEY_BYTES, "big"), block)
        put = time.perf_counter()
        np.copyto(dest[n], block)
        copies.append(time.perf_counter() - put)
        puts.append(put - started)
    await disk.close()
    return median(puts) * 1e6, median(copies) * 1e6


async def restart_ms(directory: Path, blocks: int) -> float:
    disk = DiskTier.open(directory, SMALL, 4 * blocks * SMALL.block_bytes, DiskOptions(queue_bytes=blocks * SMALL.block_bytes))
    block = np.zeros(SMALL.block_bytes, np.uint8)
    assert all(disk.put(n.to_bytes(KEY_BYTES, "big"), block) for n in range(blocks))
    await disk.close()
    started = time.perf_counter()
    disk = DiskTier.open(directory, SMALL, 4 * blocks * SMALL.block_bytes, DiskOptions(queue_bytes=MIB))
    took_s = time.perf_counter() - started
    assert len(disk.keys()) == blocks
    await disk.close()
    return took_s * 1e3


async def measure(directory: Path, quick: bool) -> list[Row]:
    rows, rounds = [], 5 if quick else 15
    for mib in SIZES_MIB:
        how = f"blocks of {BLOCK_BYTES // 1024} KiB, median of {rounds} rounds in turns"
        with tempfile.TemporaryDirectory(dir=directory) as name:
            seen = await one_size(Path(name), mib, rounds)
        put, get = seen.cold_put / seen.cold_write, seen.cold_get / seen.cold_read
        warm_put, warm_get = seen.warm_put / seen.warm_write, seen.warm_get / seen.warm_read
        rows += [
            Row(f"disk_write_{mib}mib", f"pwritev and fdatasync, {mib} MiB", seen.cold_write, "GB/s", how=how),
            Row(f"disk_put_{mib}mib", f"put to disk, {mib} MiB", put, "x", 0.7, ">=", "pwritev", how),
            Row(f"disk_read_{mib}mib", f"preadv, nothing cached, {mib} MiB", seen.cold_read, "GB/s", how=how),
            Row(f"disk_get_{mib}mib", f"get from disk, {mib} MiB", get, "x", 0.7, ">=", "preadv", how),
            Row(f"cache_write_{mib}mib", f"pwritev, cached, {mib} MiB", seen.warm_write, "GB/s", how=how),
            Row(f"cache_put_{mib}mib", f"put, cached, {mib} MiB", warm_put, "x", peer="pwritev", how=how),
            Row(f"cache_read_{mib}mib", f"preadv, cached, {mib} MiB", seen.warm_read, "GB/s", how=how),
            Row(f"cache_get_{mib}mib", f"get, cached, {mib} MiB", warm_get, "x", peer="preadv", how=how),
        ]
    with tempfile.TemporaryDirectory(dir=directory) as name:
        put_took_us, copy_took_us = await put_us(Path(name))
    rows.append(Row("disk_put_call", "a put as its caller sees it", put_took_us, "us", None, "<=", "", "one block"))
    rows.append(Row("disk_copy_call", "a copy of that block", copy_took_us, "us", None, "<=", "", "one block"))
    with tempfile.TemporaryDirectory(dir=directory) as name:
        took_ms = await restart_ms(Path(name), 10_000)
    rows.append(Row("disk_restart", "open with 10,000 blocks on disk", took_ms, "ms", None, "<=", "", "header tables read"))
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--dir", type=Path, default=Path.cwd(), help="on the disk to measure")
    options = parser.parse_args()
    report(asyncio.run(measure(options.dir, options.quick)), options.json)


if __name__ == "__main__":
    main()
