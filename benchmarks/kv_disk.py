"""The disk tier against plain file writes and reads of the same bytes, on the same disk, in turns.

Claims
- From and to the disk itself, put and get move at least 0.7 of what the quickest plain way does with the same blocks in the
  same span size, digest, index and the copy into staging included: writes until fdatasync is back (pwritev, pwritev with
  O_DIRECT, and dd itself), reads with nothing cached (preadv, and with O_DIRECT).
- The same against the page cache (gets go past it: what was read is in memory then, and not asked for again soon), what a
  put costs its caller, and the time to find 10,000 blocks after a restart are stated.

Plain files are written and read by one thread, as dd does it; the tier reads with two.

    python -m benchmarks.kv_disk [--quick] [--json FILE] [--dir DIRECTORY]
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.rows import Row, arguments, report
from core.blocks import KEY_BYTES, KvLayout
from kvtransfer.arena import Blocks, HostArena
from kvtransfer.disk import SPAN_BYTES, DiskOptions, DiskTier
from kvtransfer.segment_store import PIECE_BYTES

LAYOUT = KvLayout(b"bench" + bytes(11), "float32", 6, 2, 64, 16)  # the demo model's: 96 KiB
BLOCK_BYTES = LAYOUT.block_bytes
MIB = 2**20
SIZES_MIB = (16, 64)
SMALL = KvLayout(b"small" + bytes(11), "float32", 1, 1, 16, 16)


WRITES = ("pwritev", "pwritev with O_DIRECT", "dd conv=fdatasync")
READS = ("preadv", "preadv with O_DIRECT")


def settle(directory: Path, pattern: str) -> None:
    """What this round wrote is on the disk and nothing of it in memory: the newest two files, a round spans no more."""
    for path in sorted(directory.glob(pattern))[-2:]:
        fd = os.open(path, os.O_RDONLY)
        os.fdatasync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def write_file(path: Path, blocks: Blocks, flags: int = 0) -> None:
    """The same blocks in pieces of the tier's size, straight from memory."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | flags)
    step = PIECE_BYTES // BLOCK_BYTES
    for first in range(0, len(blocks), step):
        os.pwritev(fd, [block.data for block in blocks[first : first + step]], first * BLOCK_BYTES)
    os.close(fd)


def read_file(path: Path, out: Blocks, flags: int = 0) -> None:
    fd = os.open(path, os.O_RDONLY | flags)
    step = SPAN_BYTES // BLOCK_BYTES
    for first in range(0, len(out), step):
        os.preadv(fd, [block.data for block in out[first : first + step]], first * BLOCK_BYTES)
    os.close(fd)


def dd_s(data: Path, path: Path) -> float:
    """Seconds by dd's own clock, from a file in memory; without what starting it takes."""
    command = ["dd", f"if={data}", f"of={path}", f"bs={PIECE_BYTES // BLOCK_BYTES * BLOCK_BYTES}", "conv=fdatasync"]
    told = subprocess.run(command, capture_output=True, text=True, check=True, env={"LC_ALL": "C", "PATH": os.defpath})
    return float(told.stderr.rpartition("copied,")[2].split()[0])


class Round:
    """One turn of everybody: seconds by what was done."""

    def __init__(self, directory: Path, data: Path) -> None:
        self._directory, self._data = directory, data
        self._marked = 0.0
        self.seconds: dict[str, float] = {}

    async def run(self, disk: DiskTier, keys: list[bytes], source: Blocks, out: Blocks) -> dict[str, float]:
        self._begin()
        assert all(disk.put(key, block) for key, block in zip(keys, source, strict=True))
        assert await disk.flush()
        self._mark("cached put")
        settle(self._directory, "*/*.seg")
        self._mark("put")
        self.seconds["put"] += self.seconds["cached put"]
        self._plain_writes(source)
        for kind in ("", "cached "):
            self._begin()
            assert all(await disk.get(keys, list(out)))
            self._mark(f"{kind}get")
            read_file(self._directory / "plain", out)
            self._mark(f"{kind}preadv")
        settle(self._directory, "plain")
        with suppress(OSError):  # not every file system knows O_DIRECT
            self._begin()
            read_file(self._directory / "plain", out, os.O_DIRECT)
            self._mark("preadv with O_DIRECT")
        return self.seconds

    def _plain_writes(self, source: Blocks) -> None:
        path = self._directory / "plain"
        path.unlink(missing_ok=True)
        with suppress(OSError):
            self._begin()
            write_file(path, source, os.O_DIRECT)
            settle(self._directory, "plain")
            self._mark("pwritev with O_DIRECT")
        path.unlink(missing_ok=True)
        self.seconds["dd conv=fdatasync"] = dd_s(self._data, path)
        path.unlink()
        self._begin()
        write_file(path, source)
        self._mark("cached pwritev")
        settle(self._directory, "plain")
        self._mark("pwritev")
        self.seconds["pwritev"] += self.seconds["cached pwritev"]

    def _begin(self) -> None:
        self._marked = time.perf_counter()

    def _mark(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = now - self._marked
        self._marked = now


async def one_size(directory: Path, mib: int, rounds: int) -> dict[str, float]:
    """GB/s by what was done, medians."""
    count = mib * MIB // BLOCK_BYTES
    source, out = (HostArena(count, BLOCK_BYTES).bytes_view() for _ in range(2))
    source[:] = np.random.default_rng(0).integers(0, 256, source.shape, np.uint8)
    disk = DiskTier.open(directory, LAYOUT, 2 * (rounds + 2) * mib * MIB, DiskOptions(queue_bytes=2 * mib * MIB))
    taken = []
    with tempfile.NamedTemporaryFile(dir="/dev/shm", prefix="bench-disk-") as data:
        data.write(source)
        data.flush()
        for number in range(rounds + 1):
            keys = [(number * count + n).to_bytes(KEY_BYTES, "big") for n in range(count)]
            taken.append(await Round(directory, Path(data.name)).run(disk, keys, source, out))
    await disk.close()
    size = count * BLOCK_BYTES / 1e9
    return {name: size / median(one[name] for one in taken[1:]) for name in taken[0]}  # the first one warms all up


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


def _rows(mib: int, seen: dict[str, float], how: str) -> list[Row]:
    write, read = (max((name for name in names if name in seen), key=lambda name: seen[name]) for names in (WRITES, READS))
    wrote, was_read = (
        f"{how}; " + ", ".join(f"{name} {seen[name]:.2f} GB/s" for name in names if name in seen) for names in (WRITES, READS)
    )
    put, get = seen["put"] / seen[write], seen["get"] / seen[read]
    cached_put, cached_get = (seen[f"cached {a}"] / seen[f"cached {b}"] for a, b in (("put", "pwritev"), ("get", "preadv")))
    return [
        Row(f"disk_write_{mib}mib", f"the quickest plain write, {mib} MiB", seen[write], "GB/s", peer=write, how=wrote),
        Row(f"disk_put_{mib}mib", f"put to disk, {mib} MiB", put, "x", 0.7, ">=", write, wrote),
        Row(f"disk_read_{mib}mib", f"the quickest plain read, {mib} MiB", seen[read], "GB/s", peer=read, how=was_read),
        Row(f"disk_get_{mib}mib", f"get from disk, {mib} MiB", get, "x", 0.7, ">=", read, was_read),
        Row(f"cache_put_{mib}mib", f"put, cached, {mib} MiB", cached_put, "x", peer="pwritev", how=how),
        Row(f"cache_get_{mib}mib", f"get, against cached reads, {mib} MiB", cached_get, "x", peer="preadv", how=how),
    ]


async def measure(directory: Path, quick: bool) -> list[Row]:
    rows, rounds = [], 5 if quick else 15
    for mib in SIZES_MIB:
        how = f"blocks of {BLOCK_BYTES // 1024} KiB, median of {rounds} rounds in turns"
        with tempfile.TemporaryDirectory(dir=directory) as name:
            seen = await one_size(Path(name), mib, rounds)
        rows += _rows(mib, seen, how)
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
