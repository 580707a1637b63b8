"""Keys in runs against a dict that remembers its order: runs of any length, gaps, the bound, and moving to the front."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.entry_table import NOTHING, Keys
from router import key_runs
from router.key_runs import LOOK_KEYS, SHORT_RUN, KeyRuns, PromptKeys, short_keys


def put(runs: KeyRuns, keys: list[int], values: list[int]) -> None:
    names = np.array(keys, np.uint64)
    runs.put(names, np.array(values, np.uint32), runs.find(names))


def held(runs: KeyRuns, keys: list[int]) -> list[int]:
    return runs.at(runs.find(np.array(keys, np.uint64))).tolist()


def leading(runs: KeyRuns, keys: Keys) -> list[int]:
    values = runs.leading(keys).tolist()
    found = runs.at(runs.find(keys)).tolist()
    assert values == found[: found.index(NOTHING) if NOTHING in found else None], "the same as one by one"
    return values


def test_short_keys_are_the_first_eight_bytes():
    assert short_keys([bytes(range(16)), b"\x00" * 16]).tolist() == [int.from_bytes(bytes(range(8)), "little"), 1]


def test_keys_of_a_prompt_are_looked_up_by_the_same():
    keys = [bytes(range(n, n + 16)) for n in range(20)]
    assert PromptKeys(keys) == tuple(keys)
    assert short_keys(PromptKeys(keys)).tolist() == short_keys(keys).tolist()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), crowd=st.sampled_from([1, 2**49]))
def test_it_behaves_like_a_dict(seed: int, crowd: int):
    rng, runs, truth = random.Random(seed), KeyRuns(2000), dict[int, int]()
    pool = [2 + crowd * n for n in range(600 if crowd == 1 else 80)]
    for _ in range(30):
        first = rng.randrange(len(pool))
        some = pool[first : first + 90] if rng.random() < 0.5 else rng.sample(pool, rng.randrange(1, len(pool) // 3))
        chosen = {key: rng.randrange(0, 5) for key in some}
        keys = [*chosen, *rng.sample(list(chosen), len(chosen) // 4)]  # some of them twice
        put(runs, keys, [chosen[key] for key in keys])
        truth.update(chosen)
        truth = {key: value for key, value in truth.items() if value != NOTHING}
        assert len(runs) == len(truth)
        assert held(runs, pool) == [truth.get(key, NOTHING) for key in pool]
        start = rng.randrange(len(pool))
        leading(runs, np.array(pool[start:], np.uint64))


@pytest.mark.parametrize("run", [1, SHORT_RUN - 1, SHORT_RUN, 3 * LOOK_KEYS])
@pytest.mark.parametrize("known", [0, 1, SHORT_RUN, LOOK_KEYS, LOOK_KEYS + 1, 4 * LOOK_KEYS])
def test_runs_of_any_length_are_followed_to_the_first_gap(run: int, known: int):
    rng = random.Random(run)
    keys = [rng.randrange(2, 2**64) for _ in range(4 * LOOK_KEYS)]
    runs = KeyRuns(10_000)
    parts = [keys[:known][start : start + run] for start in range(0, known, run)]
    rng.shuffle(parts)
    for part in parts:
        put(runs, part, [len(part) % 7 + 1] * len(part))
        put(runs, [rng.randrange(2, 2**64)], [9])  # somebody else's
    assert len(leading(runs, np.array(keys, np.uint64))) == known


def test_the_oldest_make_room_and_places_are_used_again():
    runs = KeyRuns(80)
    for first in range(0, 100_000, 10):
        put(runs, [*range(first + 2, first + 12)], [1 + first % 3] * 10)
        if first % 30 == 10:
            put(runs, [first + 5], [NOTHING])
    assert 60 <= len(runs) <= 80
    assert leading(runs, np.arange(99_992, 100_002, dtype=np.uint64)) == [1 + 99_990 % 3] * 10
    assert runs.nbytes < KeyRuns(80).nbytes + 12 * (100 + 2 * key_runs.PUT_KEYS)


def test_values_are_renamed_all_at_once():
    runs = KeyRuns(1000)
    put(runs, [*range(2, 102)], [1, 2] * 50)
    assert runs.values_in_use(4).tolist() == [False, True, True, False]
    runs.replace_values(np.array([0, 3, NOTHING], dtype=np.uint32))
    assert len(runs) == 50
    assert set(held(runs, [*range(2, 102)])) == {3, NOTHING}


def test_a_portion_larger_than_the_bound_leaves_its_end():
    runs = KeyRuns(1024)
    keys = [*range(2, 2 + 3 * key_runs.PUT_KEYS)]
    put(runs, keys, [1] * len(keys))
    assert len(runs) <= 1024
    assert held(runs, keys[-100:]) == [1] * 100
