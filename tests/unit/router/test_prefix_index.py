"""The prefix index agrees with the truth after any sequence of events."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from router.prefix_index import PrefixIndex

KEYS = [bytes([n, 2]) * 8 for n in range(12)]
NODES = ["a", "b", "c", "d"]


def test_each_node_is_credited_as_far_as_it_reaches():
    index = PrefixIndex()
    index.added("a", KEYS[:3])
    index.added("b", KEYS[:5])
    index.added("c", KEYS[1:5])  # without the first block the rest is of no use
    assert index.match(KEYS) == ({"a": 3, "b": 5}, 5)
    assert index.match([]) == ({}, 0)
    assert index.match(KEYS[6:]) == ({}, 0)


def test_a_gap_ends_a_prefix():
    index = PrefixIndex()
    index.added("a", KEYS[:2] + KEYS[3:])
    assert index.match(KEYS).blocks == {"a": 2}


def test_the_oldest_keys_are_forgotten_beyond_the_bound():
    index = PrefixIndex(blocks_max=8)
    for key in KEYS:
        index.added("a", [key])
    assert len(index) <= 8
    assert index.match(KEYS).best == 0
    assert index.match(KEYS[-6:]).best == 6


def test_a_slot_is_used_again_without_what_it_stood_for():
    index = PrefixIndex()
    index.added("a", KEYS[:4])
    index.added("b", KEYS[:1])
    index.forget("a")
    index.added("c", KEYS[5:6])
    assert index.match(KEYS).blocks == {"b": 1}
    assert len(index) == 2


class Events(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex()
        self.truth: dict[str, set[bytes]] = {}

    @rule(node=st.sampled_from(NODES), keys=st.lists(st.sampled_from(KEYS)))
    def add(self, node: str, keys: list[bytes]) -> None:
        self.index.added(node, keys)
        self.truth.setdefault(node, set()).update(keys)

    @rule(node=st.sampled_from(NODES), keys=st.lists(st.sampled_from(KEYS)))
    def remove(self, node: str, keys: list[bytes]) -> None:
        self.index.removed(node, keys)
        self.truth.get(node, set()).difference_update(keys)

    @rule(node=st.sampled_from(NODES))
    def forget(self, node: str) -> None:
        self.index.forget(node)
        self.truth.pop(node, None)

    @rule(node=st.sampled_from(NODES), keys=st.lists(st.sampled_from(KEYS)))
    def resync(self, node: str, keys: list[bytes]) -> None:
        self.index.resync(node, keys)
        self.truth[node] = set(keys)

    @rule(start=st.integers(0, 3), length=st.integers(0, 12))
    def lookups_agree(self, start: int, length: int) -> None:
        prompt = KEYS[start : start + length]
        expected = {}
        for node, held in self.truth.items():
            depth = 0
            while depth < len(prompt) and prompt[depth] in held:
                depth += 1
            if depth:
                expected[node] = depth
        assert self.index.match(prompt) == (expected, max(expected.values(), default=0))

    @invariant()
    def memory_is_given_back(self) -> None:
        assert len(self.index) == len(set().union(*self.truth.values()))


Events.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestEvents = Events.TestCase
