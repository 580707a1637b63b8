"""Arenas: memory that others may map, taken whole, removed whoever dies."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from core.config import TransferConfig
from core.errors import ConfigError, StaleEpochError, TransferError
from core.inventory import Inventory
from kvtransfer.arena import HostArena, host_id
from kvtransfer.plane import offered, open_arena
from kvtransfer.shared_arena import MappedArena, SharedArena, remove_stale

OWNER = """
import sys
from kvtransfer.shared_arena import SharedArena
arena = SharedArena(sys.argv[1], "owner", 1, 4, 4096)
print(arena.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def directory(tmp_path):
    return str(tmp_path)


@pytest.fixture
def owner(directory):
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, directory], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    path = process.stdout.readline().strip()
    yield process, path
    process.kill()
    process.communicate()


@pytest.mark.parametrize("make", [lambda _: HostArena(5, 100), lambda d: SharedArena(d, "w", 1, 5, 100)])
def test_an_arena_is_zeroed_writable_memory_of_its_shape(make, directory):
    arena = make(directory)
    assert arena.bytes_view().shape == (5, 100) == (arena.num_blocks, arena.block_bytes)
    assert not arena.bytes_view().any()
    arena.bytes_view()[4] = 7
    assert arena.bytes_view()[4].all()
    assert arena.generations.dtype == np.uint64
    assert not arena.generations.any()
    arena.close()
    arena.close()
    assert not os.listdir(directory)


def test_the_inventory_writes_the_words_that_others_see(directory):
    arena = SharedArena(directory, "w", 1, 5, 100)
    inventory = Inventory(5, arena.generation_words())
    (block,) = inventory.allocate(1)
    mapped = MappedArena(arena.path, 1, directory)
    assert mapped.generations[block] == inventory.generation(block) > 0
    inventory.release([block])
    assert mapped.generations[block] == inventory.generation(block)
    inventory.check()
    arena.close()


def test_blocks_and_words_do_not_share_pages(directory):
    arena = SharedArena(directory, "w", 1, 600, 24)
    assert arena.bytes_view().ctypes.data % 4096 == 0
    assert arena.generations.ctypes.data % 4096 == 0
    arena.bytes_view()[:] = 0xFF
    assert not arena.generations.any()
    arena.close()


def test_a_reader_sees_the_same_bytes_and_cannot_write(directory):
    arena = SharedArena(directory, "w", 1, 5, 100)
    mapped = MappedArena(arena.path, 1, directory)
    arena.bytes_view()[3] = 9
    assert (mapped.blocks[3] == 9).all()
    for view in (mapped.blocks, mapped.generations):
        with pytest.raises(ValueError, match="read-only"):
            view[0] = 1
    arena.close()
    assert (mapped.blocks[3] == 9).all(), "a mapping outlives the file"


def test_a_reader_refuses_what_is_not_the_arena_it_was_told_of(directory, tmp_path):
    arena = SharedArena(directory, "w", 4, 5, 100)
    with pytest.raises(StaleEpochError):
        MappedArena(arena.path, 5, directory)
    with pytest.raises(TransferError, match="shm_dir"):
        MappedArena(arena.path, 4, "/dev/shm")
    with pytest.raises(TransferError, match="not an arena in"):
        MappedArena(f"{directory}/../{tmp_path.name}/{os.path.basename(arena.path)}", 4, directory)
    link = tmp_path / "tandem-link"
    link.symlink_to(arena.path)
    with pytest.raises(TransferError, match="cannot open"):
        MappedArena(str(link), 4, directory)
    for name, content in (("tandem-short", b"TandemKV"), ("tandem-other", bytes(8192))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TransferError):
            MappedArena(str(tmp_path / name), 4, directory)
    os.truncate(arena.path, os.path.getsize(arena.path) - 1)
    with pytest.raises(TransferError, match="shorter"):
        MappedArena(arena.path, 4, directory)
    arena.close()
    with pytest.raises(TransferError, match="gone"):
        MappedArena(arena.path, 4, directory)


def test_a_live_owner_keeps_its_file_and_a_killed_one_leaves_none_for_long(directory, owner):
    process, path = owner
    assert remove_stale(directory) == []
    assert os.path.exists(path)
    process.kill()
    process.wait()
    assert remove_stale(directory) == [path]
    assert not os.path.exists(path)


def test_opening_an_arena_removes_those_of_the_dead(directory, owner):
    process, _ = owner
    process.kill()
    process.wait()
    arena = open_arena(TransferConfig(shm_dir=directory), "w", 1, 4, 64)
    assert os.listdir(directory) == [os.path.basename(arena.path)]
    arena.close()


def test_files_that_are_not_ours_are_left_alone(directory, tmp_path):
    (tmp_path / "other").write_text("x")
    (tmp_path / "tandem-dir").mkdir()
    assert remove_stale(directory) == []
    assert sorted(os.listdir(directory)) == ["other", "tandem-dir"]


def test_two_arenas_of_one_name_are_refused(directory):
    arena = SharedArena(directory, "w", 1, 4, 64)
    with pytest.raises(ConfigError, match="live worker"):
        SharedArena(directory, "w", 1, 4, 64)
    arena.close()
    SharedArena(directory, "w", 1, 4, 64).close()


def test_a_name_cannot_leave_the_directory(directory):
    arena = SharedArena(directory, "../../x y", 1, 4, 64)
    assert os.path.dirname(arena.path) == directory
    arena.close()


def test_too_little_memory_is_said_in_bytes_and_leaves_no_file(directory):
    with pytest.raises(ConfigError, match=r"needs \d+ bytes and .* has \d+ free.*engine\.kv_bytes"):
        SharedArena(directory, "w", 1, 2**20, 2**30)
    assert not os.listdir(directory)


def test_a_directory_that_cannot_be_used_is_said(tmp_path):
    with pytest.raises(ConfigError, match=r"transfer\.shm_dir"):
        SharedArena(str(tmp_path / "missing"), "w", 1, 4, 64)


@pytest.mark.parametrize("make", [lambda _: HostArena(0, 100), lambda d: SharedArena(d, "w", 1, 5, 0)])
def test_an_empty_arena_is_refused(make, directory):
    with pytest.raises(ConfigError, match=r"engine\.kv_bytes"):
        make(directory)
    assert not os.listdir(directory)


@pytest.mark.parametrize(
    ("transport", "shared"),
    [("auto", True), ("shm", True), ("collective", True), ("tcp", False), ("grpc", False), ("loopback", False)],
)
def test_memory_is_shared_when_the_transport_may_want_it(transport, shared, directory):
    arena = open_arena(TransferConfig(transport=transport, shm_dir=directory), "w", 1, 4, 64)
    assert bool(arena.path) == shared == ("shm" in offered(arena))
    arena.close()


def test_host_ids_tell_file_systems_apart(tmp_path):
    assert host_id() == host_id()
    assert host_id(str(tmp_path)) != host_id("/proc")
    assert len(host_id("/nowhere")) == 16
