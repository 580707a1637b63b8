"""The disk tier when the disk, the bytes or the caller misbehave."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Sequence

import numpy as np
import pytest
from disk_rig import BLOCK_BYTES, TIGHT, FailingCalls, block, key, put_all, segment_paths, served, tier

from core.errors import TransferError
from kvtransfer.segment_file import OsCalls


async def test_a_changed_byte_costs_the_block_and_nothing_else(tmp_path):
    disk = tier(tmp_path)
    await put_all(disk, range(6))
    [path] = segment_paths(tmp_path)
    whole = bytearray(path.read_bytes())
    whole[-2 * BLOCK_BYTES - 5] ^= 1
    path.write_bytes(whole)
    assert await served(disk, range(6)) == [0, 1, 2, 4, 5]
    assert disk.stats.corrupt_blocks == 1
    await disk.close()
    disk = tier(tmp_path)
    assert disk.contains([key(3)]) == [False]
    await disk.close()


async def test_verify_finds_what_is_not_whole(tmp_path):
    disk = tier(tmp_path)
    await put_all(disk, range(40))
    [path] = segment_paths(tmp_path)
    whole = bytearray(path.read_bytes())
    for n in (3, 17):
        whole[len(whole) - (40 - n) * BLOCK_BYTES] ^= 128
    path.write_bytes(whole)
    assert await disk.verify() == (40, 2)
    assert await disk.verify() == (38, 0)
    assert await served(disk, range(40)) == [n for n in range(40) if n not in (3, 17)]
    await disk.close()


async def test_an_unreadable_sector_takes_one_block_with_it(tmp_path):
    calls = FailingCalls()
    disk = tier(tmp_path, calls=calls)
    await put_all(disk, range(6))
    [path] = segment_paths(tmp_path)
    at = path.stat().st_size - 2 * BLOCK_BYTES - 5
    calls.read_error_at = (at, at)
    assert await served(disk, range(6)) == [0, 1, 2, 4, 5]
    assert disk.stats.read_errors == 1
    await disk.close()


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("budget_bytes", [0, 100, 4096, 4096 + 3 * (64 + BLOCK_BYTES), 4096 + 3 * (64 + BLOCK_BYTES) + 64 + 10])
async def test_a_disk_that_takes_no_more_ends_the_writing_and_nothing_else(tmp_path, caplog, error, budget_bytes):
    disk = tier(tmp_path, calls=FailingCalls(budget_bytes, error))
    with caplog.at_level(logging.ERROR):
        for n in range(8):
            disk.put(key(n), block(key(n)))
            assert await disk.flush()
    written = max(0, (budget_bytes - 4096) // (64 + BLOCK_BYTES))
    assert await served(disk, range(8)) == list(range(written))
    assert os.strerror(error) in disk.writes_off
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert disk.stats.write_errors == 1
    assert disk.stats.put_off
    assert await disk.evict(key(0)) == (written > 0)
    await disk.close()
    disk = tier(tmp_path)
    assert await served(disk, range(8)) == list(range(written)), "not what was half written, and eviction could not be noted"
    assert not disk.writes_off
    await disk.close()


def test_a_read_only_directory_is_read(tmp_path_factory):
    """In a process of another user: to root nothing is read-only."""
    code = """
        import asyncio, os, sys, tempfile
        from pathlib import Path
        sys.path.insert(0, "tests/contract")
        from disk_rig import block, key, put_all, segment_paths, served, tier

        async def main():
            with tempfile.TemporaryDirectory() as name:
                directory = Path(name)
                directory.chmod(0o755)
                disk = tier(directory); await put_all(disk, range(5)); await disk.close()
                for path in segment_paths(directory): path.chmod(0o444)
                next(directory.iterdir()).chmod(0o555)
                if os.getuid() == 0: os.seteuid(65534)
                disk = tier(directory)
                assert "read-only" in disk.writes_off
                assert not disk.put(key(9), block(key(9)))
                assert await served(disk, range(9)) == list(range(5))
                assert await disk.evict(key(1))
                assert await served(disk, range(9)) == [0, 2, 3, 4]
                await disk.close()
                if os.getuid() == 0: os.seteuid(0)
                next(directory.iterdir()).chmod(0o755)
        asyncio.run(main())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no longer written") == 1


async def test_cancelled_it_writes_into_no_destination_afterwards(tmp_path):
    calls = _HeldReads()
    disk = tier(tmp_path, calls=calls)
    await put_all(disk, range(3))
    out = np.zeros((3, BLOCK_BYTES), np.uint8)
    reading = asyncio.create_task(disk.get([key(n) for n in range(3)], list(out)))
    assert await asyncio.to_thread(calls.reached.wait, 10)
    reading.cancel()
    done, _ = await asyncio.wait([reading], timeout=0.05)
    assert not done, "the thread still writes"
    calls.go.set()
    with pytest.raises(asyncio.CancelledError):
        await reading
    out[:] = 7
    await disk.close()
    assert (out == 7).all()


async def test_a_disk_that_does_not_answer_in_time_is_an_error(tmp_path):
    calls = _HeldReads()
    disk = tier(tmp_path, calls=calls, timeout_s=0.1)
    await put_all(disk, [1])
    reading = asyncio.create_task(served(disk, [1]))
    assert await asyncio.to_thread(calls.reached.wait, 10)
    await asyncio.wait([reading], timeout=0.3)
    calls.go.set()
    with pytest.raises(TransferError, match="did not answer within"):
        await reading
    await disk.close()


async def test_a_segment_dropped_while_it_is_read_is_read_to_its_end(tmp_path):
    calls = _HeldReads()
    disk = tier(tmp_path, TIGHT, calls=calls)
    await put_all(disk, range(3))
    reading = asyncio.create_task(served(disk, [1]))
    assert await asyncio.to_thread(calls.reached.wait, 10)
    first = segment_paths(tmp_path)[0]
    calls.go.set()  # for the writer, which copies what was read; the reader may be anywhere in its call by now
    await put_all(disk, range(10, 110))
    assert not first.exists()
    assert await reading == [1]
    await disk.close()


async def test_metrics_tell_what_happened(tmp_path):
    disk = tier(tmp_path)
    await put_all(disk, range(3))
    await served(disk, [0, 9])
    samples = {sample.name: sample.value for family in disk.collect() for sample in family.samples}
    assert samples["tandem_kv_disk_put_blocks_total"] == 3
    assert samples["tandem_kv_disk_get_hits_total"] == samples["tandem_kv_disk_get_misses_total"] == 1
    assert samples["tandem_kv_disk_blocks"] == 3
    assert samples["tandem_kv_disk_writes_off"] == 0
    assert samples["tandem_kv_disk_read_seconds_count"] == 1
    await disk.close()


class _HeldReads(OsCalls):
    def __init__(self) -> None:
        self.go, self.reached = threading.Event(), threading.Event()

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self.reached.set()
        assert self.go.wait(20)
        return super().preadv(fd, buffers, offset)
