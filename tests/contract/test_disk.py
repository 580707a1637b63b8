"""The disk tier on a real file system: what it serves and what it drops."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from disk_rig import BLOCK_BYTES, LAYOUT, ROOMY, TIGHT, block, key, put_all, segment_paths, served, tier

from core.blocks import KvLayout
from core.errors import ConfigError, TransferError
from kvtransfer.disk import DiskOptions, DiskTier
from kvtransfer.segment_file import OsCalls

PAGES = KvLayout(b"\x17" * 16, "float32", 1, 1, 32, 16)  # blocks of 4096 bytes


async def test_what_was_put_is_got_in_any_order_and_the_rest_is_missed(tmp_path):
    disk = tier(tmp_path)
    await put_all(disk, range(20))
    assert await served(disk, [7, 99, 3, 4, 5, 7, 19, 0]) == [7, 3, 4, 5, 7, 19, 0]
    assert disk.contains([key(1), key(99)]) == [True, False]
    assert set(disk.keys()) == {key(n) for n in range(20)}
    assert (disk.stats.get_hits, disk.stats.get_misses, disk.stats.put_blocks) == (7, 1, 20)
    await disk.close()


async def test_nothing_asked_for_is_nothing_got(tmp_path):
    disk = tier(tmp_path)
    assert await disk.get([], []) == []
    await disk.close()


async def test_a_put_takes_a_copy(tmp_path):
    disk, mine = tier(tmp_path), block(key(1))
    assert disk.put(key(1), mine)
    mine[:] = 0
    await disk.flush()
    assert await served(disk, [1]) == [1]
    await disk.close()


async def test_a_key_that_is_there_is_not_written_again(tmp_path):
    disk = tier(tmp_path)
    await put_all(disk, [1, 1, 1])
    assert (disk.stats.put_blocks, disk.stats.put_known) == (1, 2)
    await disk.close()


async def test_a_restart_finds_everything_and_appends_behind_it(tmp_path):
    for start in range(0, 30, 10):
        disk = tier(tmp_path)
        assert len(disk.keys()) == start
        await put_all(disk, range(start, start + 10))
        await disk.close()
    disk = tier(tmp_path)
    assert await served(disk, range(30)) == list(range(30))
    assert len(segment_paths(tmp_path)) == 1
    await disk.close()


async def test_close_writes_what_waits_and_may_be_called_twice(tmp_path):
    disk = tier(tmp_path)
    for n in range(10):
        assert disk.put(key(n), block(key(n)))
    await disk.close()
    await disk.close()
    assert not disk.put(key(11), block(key(11)))
    assert await served(disk, [1]) == []
    with pytest.raises(TransferError, match="closed"):
        await disk.evict(key(1))
    disk = tier(tmp_path)
    assert await served(disk, range(11)) == list(range(10))
    await disk.close()


async def test_an_evicted_block_stays_away_across_restarts(tmp_path):
    disk = tier(tmp_path)
    await put_all(disk, range(5))
    assert await disk.evict(key(2))
    assert not await disk.evict(key(2))
    assert await served(disk, range(5)) == [0, 1, 3, 4]
    await disk.close()
    disk = tier(tmp_path)
    assert await served(disk, range(5)) == [0, 1, 3, 4]
    await put_all(disk, [2])
    assert await served(disk, range(5)) == [0, 1, 2, 3, 4]
    await disk.close()


async def test_a_block_evicted_while_it_waits_is_never_served(tmp_path):
    calls = _HeldWrites()
    disk = tier(tmp_path, calls=calls)
    assert disk.put(key(1), block(key(1)))
    assert await disk.evict(key(1))
    calls.go.set()
    assert await disk.flush()
    assert await served(disk, [1]) == []
    await disk.close()
    disk = tier(tmp_path)
    assert await served(disk, [1]) == []
    await disk.close()


async def test_the_newest_put_is_dropped_when_too_many_wait(tmp_path):
    calls = _HeldWrites()
    disk = tier(tmp_path, calls=calls, queue_bytes=4 * BLOCK_BYTES)
    assert [disk.put(key(n), block(key(n))) for n in range(6)] == [True] * 4 + [False] * 2
    assert disk.stats.put_queue_full == 2
    calls.go.set()
    assert await disk.flush()
    assert await served(disk, range(6)) == [0, 1, 2, 3]
    await disk.close()


async def test_size_stays_bounded_and_the_oldest_go_first(tmp_path):
    disk = tier(tmp_path, TIGHT)
    for n in range(100):
        await put_all(disk, [n])
        assert disk.disk_bytes <= TIGHT
        assert sum(path.stat().st_size for path in segment_paths(tmp_path)) <= TIGHT
    there = await served(disk, range(100))
    assert there == list(range(100 - len(there), 100))
    assert disk.stats.dropped_blocks == 100 - len(there)
    assert disk.stats.dropped_age_s.count == disk.stats.dropped_blocks
    await disk.close()


async def test_more_than_a_segment_holds_is_written_all_the_same(tmp_path):
    """What a new segment has no room for must not be forgotten, or its memory never comes back."""
    disk = tier(tmp_path, ROOMY, segment_bytes=8192 + 3 * (64 + BLOCK_BYTES))
    for n in range(16):
        assert disk.put(key(n), block(key(n)))
    assert await disk.flush()
    assert await served(disk, range(16)) == list(range(16))
    await disk.close()


async def test_a_block_that_is_read_now_and_then_outlives_its_segment(tmp_path):
    disk = tier(tmp_path, TIGHT)
    for n in range(100):
        await put_all(disk, [n])
        if n % 4 == 0:
            assert await served(disk, [0]) == [0], f"lost after {n}"
    assert disk.stats.kept_blocks
    await disk.close()
    disk = tier(tmp_path, TIGHT)
    assert await served(disk, [0]) == [0]
    await disk.close()


async def test_a_bound_that_was_lowered_holds_from_the_start(tmp_path):
    disk = tier(tmp_path, ROOMY, segment_bytes=TIGHT // 4)
    await put_all(disk, range(100))
    assert disk.disk_bytes > TIGHT
    await disk.close()
    disk = tier(tmp_path, TIGHT)
    assert disk.disk_bytes <= TIGHT
    assert 0 < len(await served(disk, range(100))) < 100
    await disk.close()


def test_a_bound_too_small_for_anything_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="raise the bound"):
        tier(tmp_path, 1000)


async def test_a_second_owner_is_refused_until_the_first_is_gone(tmp_path):
    disk = tier(tmp_path)
    with pytest.raises(ConfigError, match="in use by another process"):
        tier(tmp_path)
    await disk.close()
    await tier(tmp_path).close()


@pytest.mark.parametrize(
    "other", [replace(LAYOUT, fingerprint=b"\x18" * 16), replace(LAYOUT, block_size=4), replace(LAYOUT, dtype="bfloat16")]
)
async def test_blocks_of_another_layout_live_apart(tmp_path, other):
    disk = tier(tmp_path)
    await put_all(disk, [1])
    apart = DiskTier.open(tmp_path, other, ROOMY)
    assert apart.contains([key(1)]) == [False]
    assert any(path.name.startswith(other.fingerprint.hex()) for path in tmp_path.iterdir())
    await apart.close()
    await disk.close()


async def test_the_disk_is_put_to_work_on_what_the_page_cache_takes(tmp_path):
    odd = KvLayout(b"\x17" * 16, "float32", 1, 1, 40, 1000)  # blocks of 320,000 bytes: no whole pages
    calls = _SeenWrites()
    disk = DiskTier.open(tmp_path, odd, 2**26, DiskOptions(queue_bytes=2**20, timeout_s=20.0, calls=calls))
    for n in range(20):
        assert disk.put(key(n), block(key(n), odd))
        assert await disk.flush()
    written = 20 * odd.block_bytes
    assert written - 2**20 < sum(length for _, length in calls.started) <= written
    starts = [offset for offset, _ in calls.started]
    assert starts[1:] == [offset + length for offset, length in calls.started[:-1]], "no byte twice, none left out"
    await disk.close()


@pytest.mark.parametrize("refused", ["nothing", "opening", "writing"])
async def test_whole_pages_go_past_the_page_cache_where_that_is_allowed(tmp_path, refused):
    """And through it where not."""
    calls = _DirectCalls(refused)
    for start in (0, 12):  # a restart in between, appending to the same file
        disk = DiskTier.open(tmp_path, PAGES, 2**20, DiskOptions(queue_bytes=2**16, timeout_s=20.0, calls=calls))
        for n in range(start, start + 12):
            assert disk.put(key(n), block(key(n), PAGES))
            assert await disk.flush()
        out = np.zeros((start + 12, PAGES.block_bytes), np.uint8)
        assert all(await disk.get([key(n) for n in range(start + 12)], list(out)))
        assert all(np.array_equal(out[n], block(key(n), PAGES)) for n in range(start + 12))
        assert (disk.stats.corrupt_blocks, disk.writes_off) == (0, "")
        await disk.close()
    assert bool(calls.written) == (refused == "nothing" and _has_direct(tmp_path))


def _has_direct(directory: Path) -> bool:
    try:
        os.close(os.open(directory / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError:
        return False
    return True


def test_a_place_that_cannot_be_a_directory_is_refused_by_name(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="choose another directory"):
        tier(tmp_path / "file")


class _HeldWrites(OsCalls):
    def __init__(self) -> None:
        self.go = threading.Event()

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        assert self.go.wait(20)
        return super().pwritev(fd, buffers, offset)


class _SeenWrites(OsCalls):
    def __init__(self) -> None:
        self.started: list[tuple[int, int]] = []

    def start_writing(self, fd: int, offset: int, length: int) -> None:
        super().start_writing(fd, offset, length)
        self.started.append((offset, length))


class _DirectCalls(OsCalls):
    def __init__(self, refused: str) -> None:
        self._refused = refused
        self._direct: set[int] = set()
        self.written = 0

    def open(self, path: Path, flags: int) -> int:
        direct = bool(flags & os.O_DIRECT)
        if direct and self._refused == "opening":
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fd = super().open(path, flags)
        (self._direct.add if direct else self._direct.discard)(fd)
        return fd

    def pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if fd in self._direct and self._refused == "writing":
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        moved = super().pwritev(fd, buffers, offset)
        self.written += moved * (fd in self._direct)
        return moved
