"""The table of the directory against plain sets: move by move, and at length with more entries than one sweep takes."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from core.blocks import KvSource
from core.errors import StaleEpochError
from core.request import WorkerRole
from kvtransfer.directory import LOCATE_KEYS_MAX, Delta, DirectoryError, DuplicateNodeError, NodeRecord, Tier, pack, pack_deltas
from kvtransfer.local_directory import LOOKUP_KEYS, NODES_MAX, LocalDirectory

KEYS = [random.Random(n).randbytes(16) for n in range(12)]
NAMES = ("a", "b", "c")
CHANGES = st.lists(st.tuples(st.sampled_from(KEYS), st.sampled_from(Tier)), max_size=6, unique=True)
NAME = st.sampled_from(NAMES)


def record(name: str, epoch: int = 1, address: str = "") -> NodeRecord:
    return NodeRecord(KvSource(name, epoch, address or f"{name}:1"), None, WorkerRole.PREFILL)


def announce(table: LocalDirectory, name: str, epoch: int, added, removed, now: float) -> bool:
    return all(table.announce(name, epoch, delta, now) for delta in pack_deltas(added, removed))


def found(table: LocalDirectory, keys, now: float) -> list[set[tuple[str, int, Tier]]]:
    return [set(map(tuple, held)) for held in table.locate(pack(keys), now).expand().holders]


class DirectoryMachine(RuleBasedStateMachine):
    """The model: of each name its epoch, when its time ends, and the set of what it holds."""

    @initialize()
    def start(self) -> None:
        self.table = LocalDirectory()
        self.now = 0.0
        self.nodes: dict[str, tuple[int, float, set[tuple[bytes, Tier]]]] = {}

    def alive(self, name: str) -> tuple[int, float, set[tuple[bytes, Tier]]] | None:
        node = self.nodes.get(name)
        return node if node is not None and node[1] > self.now else None

    @rule(name=NAME, epoch=st.integers(1, 4), ttl=st.sampled_from([1.0, 3.0, 10.0]), elsewhere=st.booleans())
    def join(self, name: str, epoch: int, ttl: float, elsewhere: bool) -> None:
        node = self.alive(name)
        who = record(name, epoch, f"{name}:2" if elsewhere and node is None else "")
        if node is not None and epoch < node[0]:
            with pytest.raises(StaleEpochError):
                self.table.join(who, ttl, self.now)
            return
        if node is not None and epoch == node[0]:
            who = next(one for one in self.table.nodes(self.now) if one.source.worker_id == name)
            with pytest.raises(DuplicateNodeError):
                self.table.join(record(name, epoch, "twin:9"), ttl, self.now)
        known = node is not None and node[0] == epoch
        assert self.table.join(who, ttl, self.now) is known
        self.nodes[name] = (epoch, self.now + ttl, node[2] if known and node else set())

    @rule(name=NAME, epoch=st.integers(1, 4))
    def leave(self, name: str, epoch: int) -> None:
        self.table.leave(name, epoch, self.now)
        node = self.alive(name)
        if node is not None and node[0] == epoch:
            del self.nodes[name]

    @rule(name=NAME, epoch=st.integers(1, 4), added=CHANGES, removed=CHANGES)
    def announce(self, name: str, epoch: int, added, removed) -> None:
        node = self.alive(name)
        known = node is not None and node[0] == epoch
        assert announce(self.table, name, epoch, added, removed, self.now) is known
        if known and node:
            node[2].difference_update(removed)
            node[2].update(added)

    @rule(seconds=st.floats(0.1, 5.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(order=st.permutations(KEYS), count=st.integers(0, 12))
    def locate(self, order, count: int) -> None:
        expected = []
        for key in order[:count]:
            held = {
                (name, node[0], tier)
                for name in NAMES
                for tier in Tier
                if (node := self.alive(name)) is not None and (key, tier) in node[2]
            }
            if not held:
                break
            expected.append(held)
        assert found(self.table, order[:count], self.now) == expected

    @invariant()
    def sound(self) -> None:
        if hasattr(self, "table"):
            self.table.check()
            assert {one.source.worker_id for one in self.table.nodes(self.now)} == {n for n in NAMES if self.alive(n)}


TestDirectoryMachine = DirectoryMachine.TestCase
TestDirectoryMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def keys(count: int, seed: int = 0) -> list[bytes]:
    blob = random.Random(seed).randbytes(16 * count)
    return [blob[at : at + 16] for at in range(0, len(blob), 16)]


def dram(some):
    return [(key, Tier.DRAM) for key in some]


def test_what_a_dead_node_held_is_swept_out_by_what_the_others_say():
    table = LocalDirectory()
    many = keys(200_000)
    table.join(record("a"), 10.0, 0.0)
    table.join(record("b"), 99.0, 0.0)
    announce(table, "a", 1, dram(many), [], 0.0)
    announce(table, "b", 1, dram(many[:1000]), [], 0.0)
    assert found(table, many[1000:], 11.0) == [], "dead at once"
    assert table.counts.entries > 150_000, "a lookup sweeps nothing"
    said = 0
    while table.counts.entries > 1000:
        assert table.join(record("b"), 99.0, 12.0)
        said += 1
        assert said < 40
    assert said > 3, "not all at once"
    assert found(table, many, 12.0) == [{("b", 1, Tier.DRAM)}] * 1000
    assert table.counts.swept == 200_000
    table.check()


@pytest.mark.parametrize("gap", [0, 1, LOOKUP_KEYS - 1, LOOKUP_KEYS, LOOKUP_KEYS + 1, 3 * LOOKUP_KEYS, 7999])
def test_the_first_gap_ends_a_lookup_wherever_it_lies(gap):
    table = LocalDirectory()
    many = keys(8000)
    table.join(record("a"), 10.0, 0.0)
    table.join(record("b"), 10.0, 0.0)
    announce(table, "a", 1, dram(many[:gap] + many[gap + 1 :]), [], 0.0)
    announce(table, "b", 1, dram(many[1::2][: gap // 2]), [], 0.0)
    located = found(table, many, 1.0)
    assert len(located) == gap
    assert all(("a", 1, Tier.DRAM) in held for held in located)
    assert [("b", 1, Tier.DRAM) in held for held in located] == [at % 2 == 1 and at // 2 < gap // 2 for at in range(gap)]


def test_equal_holders_travel_as_one_run():
    table = LocalDirectory()
    many = keys(2000)
    table.join(record("a"), 10.0, 0.0)
    announce(table, "a", 1, dram(many), [], 0.0)
    assert [count for count, _ in table.locate(pack(many), 0.0).runs] == [2000]


def test_a_full_table_takes_no_new_keys_and_says_so():
    table = LocalDirectory(entries_max=10)
    table.join(record("a"), 10.0, 0.0)
    table.join(record("b"), 10.0, 0.0)
    announce(table, "a", 1, dram(KEYS), [], 0.0)
    assert (table.counts.entries, table.counts.refused) == (10, 2)
    announce(table, "b", 1, dram(KEYS[:10]), [], 0.0)
    assert table.counts.refused == 2, "a known key may get another holder"
    announce(table, "a", 1, dram(KEYS[10:]), dram(KEYS[:2]), 0.0)
    announce(table, "b", 1, [], dram(KEYS[:2]), 0.0)
    announce(table, "a", 1, dram(KEYS[10:]), [], 0.0)
    assert found(table, KEYS[2:], 0.0)[-1] == {("a", 1, Tier.DRAM)}
    table.check()


def test_limits():
    table = LocalDirectory()
    for number in range(NODES_MAX):
        table.join(record(f"n{number}"), 10.0, 0.0)
    with pytest.raises(DirectoryError, match="no more of them"):
        table.join(record("one more"), 10.0, 0.0)
    assert table.join(record("n0"), 10.0, 0.0) is True
    many = pack(keys(1)) * (LOCATE_KEYS_MAX + 5)
    table.announce("n0", 1, Delta(many[:16], b"", b"", b""), 0.0)
    assert sum(count for count, _ in table.locate(many, 0.0).runs) == LOCATE_KEYS_MAX
