"""Longest-prefix lookup over many nodes, against sets."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

from router.key_runs import LOOK_KEYS, short_keys
from router.prefix_index import DEAD_MAX, PrefixIndex, Slots

KEYS = [bytes([n, 2]) * 8 for n in range(12)]


def made(blocks_max: int = 10_000) -> PrefixIndex:
    return PrefixIndex(Slots(), blocks_max)


def added(index: PrefixIndex, node: str, keys: Sequence[bytes]) -> None:
    index.added(node, short_keys(keys))


def prefix(prompt: Sequence[bytes], held: set[bytes]) -> int:
    return next((n for n, key in enumerate(prompt) if key not in held), len(prompt))


def reached(index: PrefixIndex, keys: Sequence[bytes]) -> dict[str, int]:
    depths = index.depths(short_keys(keys))
    assert depths[-1] == 0, "whoever has no slot has nothing"
    return {name: int(depths[slot]) for name, slot in index._slots.of.items() if depths[slot]}


def test_each_node_is_credited_as_far_as_it_reaches():
    index = made()
    added(index, "a", KEYS[:3])
    added(index, "b", KEYS[:5])
    added(index, "c", KEYS[1:5])  # without the first block the rest is of no use
    assert reached(index, KEYS) == {"a": 3, "b": 5}
    assert reached(index, []) == {}
    assert reached(index, KEYS[6:]) == {}


def test_a_gap_ends_a_prefix():
    index = made()
    added(index, "a", KEYS[:2] + KEYS[3:])
    assert reached(index, KEYS) == {"a": 2}


def test_the_oldest_keys_are_forgotten_beyond_the_bound():
    index = made(blocks_max=8)
    for key in KEYS:
        added(index, "a", [key])
    assert len(index) <= 8
    assert reached(index, KEYS) == {}
    assert reached(index, KEYS[-6:]) == {"a": 6}


@pytest.mark.parametrize("length", [LOOK_KEYS - 1, LOOK_KEYS, LOOK_KEYS + 1, 3 * LOOK_KEYS])
def test_long_prompts_are_followed_to_their_end(length: int):
    rng = random.Random(length)
    keys = [rng.randbytes(16) for _ in range(4 * LOOK_KEYS)]
    index = made()
    added(index, "a", keys[:length])
    added(index, "b", keys[: length - 1])
    added(index, "c", keys)
    assert reached(index, keys) == {"a": length, "b": length - 1, "c": len(keys)}


def test_nodes_that_went_count_no_more_and_leave_nothing_once_swept():
    slots = Slots()
    index = PrefixIndex(slots, 10_000)
    nodes = [f"n{n}" for n in range(4 * DEAD_MAX)]
    for node in nodes:
        added(index, node, KEYS[:4])
    added(index, "last", KEYS[:1])
    for node in nodes:
        assert slots.drop(node)
        assert not slots.drop(node)
        if slots.worth_sweeping():
            index.sweep()
            slots.swept()
    assert slots.worth_sweeping() == (slots.dead != 0)
    index.sweep()
    slots.swept()
    assert len(index) == 1
    added(index, "new", KEYS[5:6])
    assert slots.of["new"] < len(nodes), "its number was used before"
    assert reached(index, KEYS) == {"last": 1}


def test_sets_in_use_do_not_make_every_update_slow(monkeypatch: pytest.MonkeyPatch):
    """More distinct sets than the bound: it moves, instead of being checked again and again."""
    monkeypatch.setattr("router.prefix_index.SETS_MAX", 4)
    index = made()
    index._sets_max = 4
    keys = [n.to_bytes(8, "little") * 2 for n in range(2, 66)]
    for n in range(6):
        added(index, f"n{n}", [key for at, key in enumerate(keys) if at >> n & 1])
    assert index._sets_max >= 64
    assert reached(index, keys[63:]) == {f"n{n}": 1 for n in range(6)}
    assert np.array_equal(index.depths(short_keys(keys[:1])), np.zeros(7))


def test_it_agrees_with_sets_for_many_nodes():
    rng = random.Random(7)
    index, truth = made(), dict[str, set[bytes]]()
    keys = [rng.randbytes(16) for _ in range(400)]
    for _ in range(600):
        node, start, length = f"n{rng.randrange(80)}", rng.randrange(400), rng.randrange(1, 200)
        some = keys[start : start + length] if rng.random() < 0.7 else rng.sample(keys, length)
        if rng.random() < 0.7:
            added(index, node, [*some, *some[:3]])
            truth.setdefault(node, set()).update(some)
        else:
            index.removed(node, short_keys([*some, *some[:3]]))
            truth.get(node, set()).difference_update(some)
    assert len(index) == len(set().union(*truth.values()))
    for start in range(0, 400, 13):
        prompt = keys[start:]
        expected = {node: prefix(prompt, held) for node, held in truth.items()}
        assert reached(index, prompt) == {node: depth for node, depth in expected.items() if depth}
