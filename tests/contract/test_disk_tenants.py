"""Whose a block is and what computing it took stays with it on disk: across restarts, and whatever happens to the file."""

from __future__ import annotations

import struct

import pytest
from disk_rig import BLOCK_BYTES, TIGHT, FailingCalls, block, key, segment_paths, served, tier

from kvtransfer import disk_tenants
from kvtransfer.disk_tenants import DiskTenants, number_of
from kvtransfer.segment_file import OsCalls
from kvtransfer.segments import HEADER_BYTES, SLOT_BYTES


async def put(disk, n, tenant=b"", cost_s=0.0):
    assert disk.put(key(n), block(key(n)), tenant, cost_s)
    assert await disk.flush()


def owners(disk, numbers):
    return [record and (record.tenant, record.cost_s) for record in disk.find([key(n) for n in numbers])]


async def test_tenant_and_cost_are_kept_across_restarts(tmp_path):
    disk = tier(tmp_path)
    await put(disk, 1, b"acme", 0.25)
    await put(disk, 2)
    await put(disk, 3, b"b\0\xff" * 30, 1e-6)
    await put(disk, 4, b"acme", 3.0)
    told = [(b"acme", 0.25), (b"", 0.0), (b"b\0\xff" * 30, 1e-6), (b"acme", 3.0), None]
    assert owners(disk, range(1, 6)) == told
    await disk.close()
    for _ in range(2):
        disk = tier(tmp_path)
        assert owners(disk, range(1, 6)) == told
        assert await served(disk, range(1, 6)) == [1, 2, 3, 4]
        await disk.close()


async def test_a_copy_out_of_a_segment_that_goes_is_still_theirs(tmp_path):
    disk = tier(tmp_path, TIGHT)
    await put(disk, 0, b"acme", 0.5)
    for n in range(1, 40):
        assert await served(disk, [0]) == [0]
        await put(disk, n)
    assert disk.stats.kept_blocks > 0
    assert owners(disk, [0]) == [(b"acme", 0.5)]
    await disk.close()


async def test_files_written_before_headers_told_are_read_as_nobodys(tmp_path):
    disk = tier(tmp_path)
    await put(disk, 1)
    await put(disk, 2)
    await disk.close()
    [path] = segment_paths(tmp_path)
    told = struct.Struct("<16sQQd16xQ")  # the header of a slot as it was: 16 bytes of nothing before the checksum
    for slot in range(2):
        entry = path.read_bytes()[HEADER_BYTES + slot * SLOT_BYTES :][:SLOT_BYTES]
        assert told.pack(*told.unpack(entry)) == entry, "nobody's block of unknown cost is written as it always was"
    assert not (path.parent / "tenants").exists()
    disk = tier(tmp_path)
    assert owners(disk, [1, 2]) == [(b"", 0.0)] * 2
    await disk.close()


@pytest.mark.parametrize("damage", ["lost", "cut", "flipped", "grown"])
async def test_a_damaged_file_of_tenants_costs_names_and_no_block(tmp_path, damage):
    disk = tier(tmp_path)
    for n, tenant in enumerate((b"first", b"second")):
        await put(disk, n, tenant, 0.5)
    await disk.close()
    [path] = tmp_path.glob("*/tenants")
    data = path.read_bytes()
    if damage == "lost":
        path.unlink()
    else:
        path.write_bytes({"cut": data[:-1], "flipped": data[:-1] + b"?", "grown": data + b"\x05"}[damage])
    names = [b"" if damage == "lost" else b"first", b"second" if damage == "grown" else b""]
    disk = tier(tmp_path)
    assert owners(disk, [0, 1]) == [(name, 0.5) for name in names]
    assert await served(disk, [0, 1]) == [0, 1]
    await put(disk, 2, b"third", 1.0)
    await disk.close()
    disk = tier(tmp_path)
    assert owners(disk, [2]) == [(b"third", 1.0)], "what is written after damage is whole"
    await disk.close()


async def test_a_disk_that_is_full_when_a_tenant_first_comes_turns_writes_off(tmp_path):
    calls = FailingCalls()
    disk = tier(tmp_path, calls=calls)
    await put(disk, 1, b"acme")
    calls.budget_bytes = BLOCK_BYTES + 4
    disk.put(key(2), block(key(2)), b"other")
    assert await disk.flush()
    assert disk.writes_off
    assert await served(disk, [1, 2]) == [1]
    await disk.close()
    disk = tier(tmp_path)
    assert owners(disk, [1, 2]) == [(b"acme", 0.0), None]
    await disk.close()


def test_names_that_no_record_needs_are_left_out(tmp_path):
    names = DiskTenants(tmp_path, OsCalls())
    numbers = [names.note(tenant) for tenant in (b"a", b"b", b"c", b"a")]
    assert numbers[0] == numbers[3] == number_of(b"a")
    names.close()
    names = DiskTenants(tmp_path, OsCalls())
    names.read()
    names.keep({b"b"})
    names.note(b"d")
    names.close()
    again = DiskTenants(tmp_path, OsCalls())
    again.read()
    assert [again.name(number_of(tenant)) for tenant in (b"a", b"b", b"c", b"d")] == [b"", b"b", b"", b"d"]


def test_so_many_tenants_and_such_long_names(tmp_path, monkeypatch):
    monkeypatch.setattr(disk_tenants, "TENANTS_MAX", 2)
    names = DiskTenants(tmp_path, OsCalls())
    assert names.note(b"") == names.note(b"x" * 1025) == 0
    assert names.note(b"x" * 1024)
    assert names.note(b"y")
    assert names.note(b"z") == 0
    assert names.note(b"y") == number_of(b"y")
    assert len(names) == 2
    names.close()


def test_a_file_that_cannot_be_replaced_stays(tmp_path):
    names = DiskTenants(tmp_path, OsCalls())
    names.note(b"a")
    names.close()
    (tmp_path / "tenants.new").mkdir()
    names.keep(set())
    assert names.name(number_of(b"a")) == b"a"


@pytest.mark.parametrize(("share", "stays"), [(1.0, False), (0.5, True)])
async def test_a_tenant_beyond_its_share_of_the_disk_loses_its_own_blocks_first(tmp_path, share, stays):
    disk = tier(tmp_path, TIGHT, tenant_share=share)
    for n in range(6):
        await put(disk, n, b"quiet")
        await put(disk, 300 + n, b"loud")
    for n in range(100, 220):
        await put(disk, n, b"loud")
    assert disk.stats.dropped_blocks > 60
    assert await served(disk, range(6)) == (list(range(6)) if stays else [])
    assert disk.disk_bytes <= TIGHT
    await disk.close()
    disk = tier(tmp_path, TIGHT, tenant_share=share)
    for n in range(220, 260):
        await put(disk, n, b"loud")
    assert await served(disk, range(6)) == (list(range(6)) if stays else []), "known after a restart as well"
    await disk.close()
