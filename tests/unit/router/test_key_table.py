"""The key table against a dict, with crowded places, growth and the bound."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from router.key_table import NOTHING, KeyTable, short_keys


def test_short_keys_are_the_first_eight_bytes():
    assert short_keys([bytes(range(16)), b"\x00" * 16]).tolist() == [int.from_bytes(bytes(range(8)), "little"), 2]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), crowd=st.sampled_from([1, 1024]))
def test_it_behaves_like_a_dict(seed, crowd):
    """`crowd` 1024: all keys want the same place."""
    rng, table, truth = random.Random(seed), KeyTable(100_000), {}
    pool = [2 + crowd * n for n in range(600 if crowd == 1 else 80)]
    for _ in range(30):
        chosen = {key: rng.randrange(0, 5) for key in rng.sample(pool, rng.randrange(1, len(pool) // 3))}
        keys = [*chosen, *rng.sample(list(chosen), len(chosen) // 4)]  # some of them twice
        values = [chosen[key] for key in keys]
        table.put(np.array(keys, dtype=np.uint64), np.array(values, dtype=np.uint32))
        truth.update(zip(keys, values, strict=True))
        truth = {key: value for key, value in truth.items() if value != NOTHING}
        assert len(table) == len(truth)
        assert table.get(np.array(pool, dtype=np.uint64)).tolist() == [truth.get(key, NOTHING) for key in pool]


def test_the_oldest_make_room():
    table = KeyTable(80)
    for first in range(0, 1000, 10):
        keys = np.arange(first + 2, first + 12, dtype=np.uint64)
        table.put(keys, np.ones(10, dtype=np.uint32))
        assert len(table) <= 80
    assert table.get(np.arange(992, 1002, dtype=np.uint64)).tolist() == [1] * 10
    assert len(table) >= 60


def test_values_are_renamed_all_at_once():
    table = KeyTable(1000)
    table.put(np.arange(2, 102, dtype=np.uint64), np.tile(np.array([1, 2], dtype=np.uint32), 50))
    assert table.values_in_use(4).tolist() == [False, True, True, False]
    table.replace_values(np.array([0, 3, NOTHING], dtype=np.uint32))
    assert len(table) == 50
    assert set(table.get(np.arange(2, 102, dtype=np.uint64)).tolist()) == {3, NOTHING}
