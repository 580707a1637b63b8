"""The table of block keys against a dict: few keys in any order, many as they grow, churn, and keys that crowd together."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.entry_table import NOTHING, PART_KEYS_MAX, PART_PLACES, SHARE, EntryTable, Keys, Values, distinct

MANY = np.random.default_rng(1).integers(1, 2**64 - 1, 300_000, dtype=np.uint64)


def same(values: Values) -> Values:
    return values


def put(table: EntryTable, keys: Keys, value: int) -> int:
    table.grow(keys.size, same)
    return table.change(keys, lambda _, old: np.full(old.size, value, np.uint32))


@settings(deadline=None)
@given(st.lists(st.tuples(st.lists(st.integers(1, 40), unique=True), st.integers(0, 3)), max_size=30), st.integers(0, 3))
def test_it_is_a_dict(changes, fold):
    """`fold`: keys whose home is one place, up to those of all keys."""
    alike = {0: 1, 1: 2**20, 2: 2**40, 3: 2**58}[fold]
    table, model = EntryTable(1000), {}
    for keys, value in changes:
        assert put(table, np.array(keys, np.uint64) * np.uint64(alike), value) == 0
        model |= dict.fromkeys(keys, value)
        held = [model.get(key, NOTHING) for key in range(1, 41)]
        assert table.get(np.arange(1, 41, dtype=np.uint64) * np.uint64(alike)).tolist() == held
        assert [table.one(key * alike % 2**64) for key in range(1, 41)] == held
        assert len(table) == np.count_nonzero(held)
        assert sorted(table.values().tolist()) == sorted(filter(None, held))


def test_it_grows_part_by_part_and_loses_nothing():
    table = EntryTable(MANY.size)
    parts = [table.parts]
    for start in range(0, MANY.size, 10_000):
        assert put(table, MANY[start : start + 10_000], 1 + start // 10_000) == 0
        parts.append(table.parts)
        assert len(table) == start + 10_000
    assert max(np.diff(parts)) <= 2, "as many keys, as many splits"
    assert 0.8 * SHARE <= len(table) / (table.parts * PART_PLACES) <= SHARE
    assert table.get(MANY).tolist() == np.repeat(np.arange(1, 31), 10_000).tolist()
    assert [table.one(key) for key in MANY[::999].tolist()] == table.get(MANY[::999]).tolist()
    assert not table.get(np.setdiff1d(np.arange(1, 50_000, dtype=np.uint64), MANY)).any()


def test_keys_that_come_and_go_take_no_more_places():
    table = EntryTable(MANY.size)
    for start in range(0, MANY.size, 5_000):
        put(table, MANY[start : start + 5_000], 7)
        if start >= 40_000:
            put(table, MANY[start - 40_000 : start - 35_000], NOTHING)
    assert len(table) == 40_000
    assert table.parts <= 8, "as many as 40,000 keys need, and a few"
    assert (table.get(MANY[-40_000:]) == 7).all()
    assert not table.get(MANY[:-40_000]).any()


def test_entries_are_recast_as_their_part_is_split_and_in_place():
    table = EntryTable(MANY.size)
    put(table, MANY[:8_000], 2)
    table.grow(100_000, lambda values: np.where(values == 2, np.uint32(3), values))
    assert table.parts > 4
    assert set(table.get(MANY[:8_000]).tolist()) == {3}
    for part in range(table.parts):
        table.recast(part, np.zeros_like)
    assert len(table) == 0
    assert not table.get(MANY[:8_000]).any()


def test_a_part_that_is_full_refuses_new_keys_and_keeps_the_others():
    table = EntryTable(10)  # of one part
    assert put(table, MANY[: PART_KEYS_MAX - 10], 1) == 0
    heard = []
    crowd = np.concatenate((MANY[:10], MANY[PART_KEYS_MAX : PART_KEYS_MAX + 20]))
    assert table.change(crowd, lambda keys, old: heard.append(keys) or np.full(old.size, 2, np.uint32)) == 20
    assert heard[0].tolist() == MANY[:10].tolist()
    assert set(table.get(MANY[:10]).tolist()) == {2}
    assert put(table, MANY[PART_KEYS_MAX : PART_KEYS_MAX + 10], 1) == 0, "as many as there is room for"


@pytest.mark.parametrize("keys", [[], [5], [5, 5, 5], [9, 1, 9, 2**64 - 1, 1]])
def test_distinct(keys):
    assert distinct(np.array(keys, np.uint64)).tolist() == sorted(set(keys))


def test_where_address_space_is_short_the_table_is_smaller():
    """As under `ulimit -v`: 32 million keys would take 1.9 GB of it."""
    script = """
import resource, numpy as np
from core.entry_table import PART_PLACES, EntryTable
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize")) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, used + 2**29))
table = EntryTable(32_000_000)
table.grow(100_000_000, lambda values: values)
print(table.parts * PART_PLACES * 12)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert 2**27 < int(done.stdout) <= 2**29
