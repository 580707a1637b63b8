"""The index agrees with the truth after any sequence of events, losses, resyncs and restarts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from core.inventory import Inventory
from core.kv_changes import ChangeFeed, KvChanges
from router.block_index import EXPECTED_S, BlockIndex
from router.kv_events import STREAMS_MAX, KvEvents

KEYS = tuple(bytes([n, 2]) * 8 for n in range(12))
NODES = ["a", "b", "c"]


def prefix(prompt: Sequence[bytes], held: set[bytes]) -> int:
    return next((n for n, key in enumerate(prompt) if key not in held), len(prompt))


def reached(index: BlockIndex, keys: tuple[bytes, ...] = KEYS) -> dict[str, int]:
    depths = index.match(keys).depths
    return {name: int(depths[slot]) for name, slot in index.slots.of.items() if depths[slot]}


def said(stream: int, sequence: int, *keys: bytes, **lists: bytes) -> KvChanges:
    return KvChanges(stream, sequence, b"".join(keys), **lists)


def test_portions_add_up():
    index = BlockIndex(1000)
    events = KvEvents(index)
    stream = events.up("a")
    assert events.heard("a", said(stream, 1, *KEYS[:3])) is None
    assert events.heard("a", said(stream, 2, KEYS[3], removed_dram=KEYS[1])) is None
    assert reached(index) == {"a": 1}
    assert events.heard("a", said(stream, 3, KEYS[1])) is None
    assert reached(index) == {"a": 4}


def test_a_gap_asks_for_everything_again_and_nothing_is_believed_until_it_comes():
    index = BlockIndex(1000)
    events = KvEvents(index)
    first = events.up("a")
    events.heard("a", said(first, 1, *KEYS[:3]))
    second = events.heard("a", said(first, 3, KEYS[3]))
    assert second not in (None, first)
    assert reached(index) == {}
    assert events.heard("a", said(first, 4, KEYS[4])) is None, "what is left of the old stream is ignored"
    assert events.heard("a", said(second, 1, *KEYS[:5])) is None
    assert (reached(index), events.gaps) == ({"a": 5}, 1)


def test_a_node_that_never_gets_it_right_is_believed_nothing():
    index = BlockIndex(1000)
    events = KvEvents(index)
    stream: int | None = events.up("a")
    asked = 1
    while stream is not None:
        events.heard("a", said(stream, 1, KEYS[0]))
        stream = events.heard("a", said(stream, 9))
        asked += stream is not None
    assert asked == STREAMS_MAX
    assert reached(index) == {}
    assert events.broken("a") is None
    assert events.heard("a", said(events.up("a"), 1, KEYS[0])) is None, "a new session is a new chance"
    assert reached(index) == {"a": 1}


def test_disks_count_for_the_best_and_memory_for_each_node():
    index = BlockIndex(1000)
    index.heard("store", said(0, 1, KEYS[0], added_disk=b"".join(KEYS[:6])))
    index.heard("a", said(0, 1, *KEYS[:2]))
    match = index.match(KEYS)
    assert reached(index) == {"store": 1, "a": 2}
    assert match.best == 6
    assert index.match(KEYS) is match, "asked again, it is not looked up again"
    index.heard("store", said(0, 2, removed_disk=b"".join(KEYS[:6])))
    assert index.match(KEYS).best == 2


def test_what_was_placed_counts_for_a_while():
    index = BlockIndex(1000)
    index.expect("a", KEYS[:4], now=100.0)
    index.heard("b", said(0, 1, *KEYS[:2]))
    index.expire(100.0 + EXPECTED_S / 2)
    assert reached(index) == {"a": 4, "b": 2}
    index.expire(100.0 + EXPECTED_S)
    assert reached(index) == {"b": 2}
    index.expect("b", KEYS[:4], now=200.0)
    index.forget("b")
    assert reached(index) == {}
    index.expire(300.0)


def test_places_follow_the_nodes():
    index = BlockIndex(1000)
    index.heard("a", said(0, 1, *KEYS[:2]))
    index.heard("b", said(0, 1, *KEYS[:3]))
    version = index.slots.version
    assert index.match(KEYS).depths[index.places(("b", "nobody", "a"))].tolist() == [3, 0, 2]
    index.forget("a")
    assert index.slots.version != version
    assert index.match(KEYS).depths[index.places(("b", "nobody", "a"))].tolist() == [3, 0, 0]


def test_places_count_after_everybody_went():
    index = BlockIndex(1000)
    for name in ("a", "b"):
        index.heard(name, said(0, 1, *KEYS[:2]))
    for name in ("a", "b"):
        index.forget(name)
    assert index.match(KEYS).depths[index.places(("a", "c"))].tolist() == [0, 0]


class Stories(RuleBasedStateMachine):
    """Nodes with real inventories, sessions that lose and repeat portions, nodes and routers that begin anew."""

    @initialize()
    def begin(self) -> None:
        self.inventories = {node: Inventory(6) for node in NODES}
        self.feeds: dict[str, ChangeFeed] = {}
        self.router_begins_anew()

    def _ask(self, node: str, stream: int | None) -> None:
        if stream is not None:
            if node in self.feeds:
                self.feeds[node].close()
            self.feeds[node] = ChangeFeed(self.inventories[node], stream)

    def _deliver(self, node: str, *portions: KvChanges) -> None:
        for changes in portions:
            self._ask(node, self.events.heard(node, changes))

    @rule()
    def router_begins_anew(self) -> None:
        self.index = BlockIndex(1000)
        self.events = KvEvents(self.index)
        for node in NODES:
            self._ask(node, self.events.up(node))

    @rule(node=st.sampled_from(NODES), keys=st.lists(st.sampled_from(KEYS), min_size=1, max_size=6))
    def blocks_come(self, node: str, keys: list[bytes]) -> None:
        inventory = self.inventories[node]
        for key in keys:
            (block,) = inventory.allocate(1)
            inventory.release([inventory.commit(block, key)])

    @rule(node=st.sampled_from(NODES), keys=st.lists(st.sampled_from(KEYS), max_size=4))
    def blocks_go(self, node: str, keys: list[bytes]) -> None:
        self.inventories[node].evict(keys)

    @rule(node=st.sampled_from(NODES))
    def a_node_begins_anew(self, node: str) -> None:
        self.inventories[node] = Inventory(6)
        self.feeds.pop(node).close()
        self.events.down(node)
        self._ask(node, self.events.up(node))

    @rule(node=st.sampled_from(NODES), loss=st.sampled_from(["", "", "lost", "twice"]))
    def a_portion_travels(self, node: str, loss: str) -> None:
        changes = self.feeds[node].next()
        if changes is not None and loss != "lost":
            self._deliver(node, *[changes] * (2 if loss == "twice" else 1))

    @rule(node=st.sampled_from(NODES))
    def something_old_travels(self, node: str) -> None:
        self._deliver(node, replace(said(1, 2, *KEYS), stream=0))

    @precondition(lambda self: self.feeds)
    @rule()
    def when_all_is_heard_the_index_is_the_truth(self) -> None:
        for node in NODES:
            if not self._whole(node):
                self._ask(node, self.events.up(node))  # a session that lost its last portion notices with the next one
            while (changes := self.feeds[node].next()) is not None:
                self._deliver(node, changes)
        truth = {node: {entry.key for entry in self.inventories[node].entries()} for node in NODES}
        for start in range(len(KEYS)):
            prompt = KEYS[start:]
            depths = {node: prefix(prompt, held) for node, held in truth.items()}
            assert reached(self.index, prompt) == {node: depth for node, depth in depths.items() if depth}
        assert len(self.index) == len(set().union(*truth.values()))

    def _whole(self, node: str) -> bool:
        stream = self.events._streams[node]
        feed = self.feeds[node]
        return stream.number == feed.stream and stream.next == feed._sequence + 1 and not stream.given_up

    @invariant()
    def memory_is_bounded(self) -> None:
        assert len(self.index) <= len(KEYS)


Stories.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestStories = Stories.TestCase
