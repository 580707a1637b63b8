"""Files torn, cut and damaged at every byte; a writer killed in mid-write; a limit on file size that the kernel enforces."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from disk_rig import BLOCK_BYTES, LAYOUT, ROOMY, block, key, put_all, segment_paths, tier

from kvtransfer.codec import digest_of
from kvtransfer.segment_file import OsCalls
from kvtransfer.segment_store import SegmentStore
from kvtransfer.segments import HEADER_BYTES, SLOT_BYTES, Geometry

HERE = Path(__file__).parent
RECORDS = 3
GEOMETRY = Geometry(BLOCK_BYTES, 8)
BYTES = GEOMETRY.bytes_with(RECORDS)
TOLD = [
    *range(120),  # the header and the first of its padding
    *range(HEADER_BYTES - 12, HEADER_BYTES + RECORDS * SLOT_BYTES + 8),  # its checksum, all record headers, the next one
    *range(GEOMETRY.data_offset - 4, BYTES),  # all bytes of all records
]
"""Every byte that says something; of the padding between, some."""


async def segment_of(directory: Path) -> tuple[Path, bytes]:
    disk = tier(directory, 4 * GEOMETRY.segment_bytes + 4096)
    await put_all(disk, range(RECORDS))
    await disk.close()
    [path] = segment_paths(directory)
    return path, path.read_bytes()


def whole_after_restart(root: Path) -> set[int]:
    """The records that a store finds and serves; asserts that each is whole."""
    store = SegmentStore.open(root, LAYOUT, GEOMETRY, ROOMY, OsCalls(), lambda: 0.0)
    keys = {key(n): n for n in range(RECORDS)}
    served, out = set(), np.empty(BLOCK_BYTES, np.uint8)
    with store.pinned(list(keys)) as found:
        for one, place in zip(keys, found, strict=True):
            if place is None:
                continue
            file, record = place
            file.read(record.slot, [out])
            if digest_of(out) == record.digest:
                assert np.array_equal(out, block(one)), "other bytes under this key"
                served.add(keys[one])
    store.close()
    return served


async def test_cut_at_every_byte_it_serves_what_stands_before_the_cut(tmp_path):
    path, whole = await segment_of(tmp_path)
    assert len(whole) == GEOMETRY.data_offset + RECORDS * BLOCK_BYTES
    for size in TOLD:
        path.write_bytes(whole[:size])
        expected = max(0, (size - GEOMETRY.data_offset) // BLOCK_BYTES)
        assert whole_after_restart(tmp_path) == set(range(expected)), f"cut at {size}"
        assert not path.exists() or path.stat().st_size <= GEOMETRY.bytes_with(expected), "the torn tail is still there"


async def test_a_flipped_bit_in_any_byte_costs_at_most_what_it_is_part_of(tmp_path):
    path, whole = await segment_of(tmp_path)
    everything = set(range(RECORDS))
    for at in TOLD:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        left = whole_after_restart(tmp_path)
        if at < HEADER_BYTES:
            assert left == set(), f"a damaged header at {at} was believed"
        elif at < HEADER_BYTES + RECORDS * SLOT_BYTES:
            assert left == everything - {(at - HEADER_BYTES) // SLOT_BYTES}, f"at {at}"
        elif at < GEOMETRY.data_offset:
            assert left == everything, f"at {at}"
        else:
            assert left == everything - {(at - GEOMETRY.data_offset) // BLOCK_BYTES}, f"at {at}"


async def test_pages_that_never_reached_the_disk_are_never_served(tmp_path):
    """A power cut may keep a record's header and lose its bytes."""
    path, whole = await segment_of(tmp_path)
    holed = bytearray(whole)
    holed[GEOMETRY.data_offset + BLOCK_BYTES :] = bytes(2 * BLOCK_BYTES)
    path.write_bytes(holed)
    assert whole_after_restart(tmp_path) == {0}


async def test_a_file_of_another_number_or_of_none_is_not_believed(tmp_path):
    path, whole = await segment_of(tmp_path)
    path.unlink()
    path.with_name(f"{77:016x}.seg").write_bytes(whole)
    path.with_name("notes.seg").write_bytes(whole)
    assert whole_after_restart(tmp_path) == set()
    assert path.with_name("notes.seg").exists(), "not ours to remove"


async def test_a_key_in_two_segments_can_be_evicted_for_good(tmp_path):
    """A kill between copying a record into a new segment and removing the old one leaves two."""
    path, _ = await segment_of(tmp_path)
    second = tmp_path / "second"
    disk = tier(second, 4 * GEOMETRY.segment_bytes + 4096)
    disk._store._newest = 8
    await put_all(disk, range(RECORDS))
    await disk.close()
    [copy] = segment_paths(second)
    copy.rename(path.with_name(copy.name))
    for expected in ({0, 1, 2}, {0, 2}):
        assert whole_after_restart(tmp_path) == expected
        disk = tier(tmp_path)
        await disk.evict(key(1))
        await disk.close()


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_any_moment_it_serves_whole_blocks_only(tmp_path, seed):
    done = subprocess.run(
        [sys.executable, str(HERE / "disk_crash_rounds.py"), str(tmp_path), "12", str(seed)],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 500, "too few blocks survived for the test to mean anything"


def test_a_limit_that_the_kernel_enforces_is_survived():
    code = """
        import asyncio, resource, tempfile
        from pathlib import Path
        from disk_rig import block, key, served, tier
        async def main(directory):
            disk = tier(directory)
            resource.setrlimit(resource.RLIMIT_FSIZE, (%d, resource.RLIM_INFINITY))
            for n in range(600):
                disk.put(key(n), block(key(n)))
                await disk.flush()
            assert "too large" in disk.writes_off.lower(), disk.writes_off
            there = await served(disk, range(600))
            assert there == list(range(100)), there
            await disk.close()
            disk = tier(directory)
            assert await served(disk, range(600)) == list(range(100))
            await disk.close()
        with tempfile.TemporaryDirectory() as name: asyncio.run(main(Path(name)))
    """
    # a megabyte of segments of 256 KiB: the limit falls into the first one, after a hundred records and a half
    slots = (ROOMY // 4 - 2 * HEADER_BYTES) // (BLOCK_BYTES + SLOT_BYTES)
    limit = Geometry(BLOCK_BYTES, slots).bytes_with(100) + BLOCK_BYTES // 2
    command = [sys.executable, "-c", textwrap.dedent(code % limit)]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no longer written") == 1
