"""What a node says of its blocks: portions that add up to the truth, for each listener at its own pace."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from core.blocks import KEY_BYTES
from core.errors import InvalidRequestError
from core.inventory import Inventory
from core.kv_changes import KEYS_MAX, ChangeFeed, KvChanges

KEYS = [bytes([n]) * KEY_BYTES for n in range(1, 13)]


def keys_in(packed: bytes) -> list[bytes]:
    return [packed[at : at + KEY_BYTES] for at in range(0, len(packed), KEY_BYTES)]


def compute(inventory: Inventory, *keys: bytes) -> None:
    for key in keys:
        (block,) = inventory.allocate(1)
        inventory.release([inventory.commit(block, key)])


class Listener:
    """Applies portions to what it believes, and insists on their rules."""

    def __init__(self, inventory: Inventory) -> None:
        self.feed = ChangeFeed(inventory, 3)
        self.dram: set[bytes] = set()
        self.disk: set[bytes] = set()
        self.sequence = 0

    def hear(self) -> bool:
        changes = self.feed.next()
        if changes is None:
            return False
        assert changes.check().stream == 3
        assert changes.sequence == self.sequence + 1
        self.sequence = changes.sequence
        for known, added, removed in (
            (self.dram, keys_in(changes.added_dram), keys_in(changes.removed_dram)),
            (self.disk, keys_in(changes.added_disk), keys_in(changes.removed_disk)),
        ):
            assert not set(added) & set(removed)
            assert set(removed) <= known
            known -= set(removed)
            known |= set(added)
        return True


def test_the_first_portion_comes_even_when_nothing_is_there():
    feed = ChangeFeed(Inventory(4))
    assert feed.next() == KvChanges(0, 1)
    assert feed.next() is None


def test_much_is_said_in_portions():
    inventory = Inventory(KEYS_MAX + 10)
    keys = [n.to_bytes(KEY_BYTES, "big") for n in range(KEYS_MAX + 10)]
    compute(inventory, *keys)
    listener = Listener(inventory)
    assert listener.hear()
    assert len(listener.dram) == KEYS_MAX
    assert listener.hear()
    assert listener.dram == set(keys)
    assert not listener.hear()


@pytest.mark.parametrize(
    "changes", [KvChanges(1, 0), KvChanges(1, 1, b"x"), KvChanges(1, 1, removed_disk=bytes(16 * (KEYS_MAX + 1)))]
)
def test_what_no_node_sends_is_refused(changes: KvChanges):
    with pytest.raises(InvalidRequestError, match="same version"):
        changes.check()


class Stories(RuleBasedStateMachine):
    """Two listeners that come, hear and go as they like, beside the inventory's own reader."""

    @initialize()
    def begin(self) -> None:
        self.inventory = Inventory(8)
        self.disk: set[bytes] = set()
        self.listeners: list[Listener] = []

    @rule(keys=st.lists(st.sampled_from(KEYS), min_size=1, max_size=5))
    def blocks_come_and_push_others_out(self, keys: list[bytes]) -> None:
        compute(self.inventory, *keys)

    @rule(keys=st.lists(st.sampled_from(KEYS), max_size=5))
    def blocks_are_dropped(self, keys: list[bytes]) -> None:
        self.inventory.evict(keys)

    @rule(keys=st.sets(st.sampled_from(KEYS)))
    def the_disk_changes(self, keys: set[bytes]) -> None:
        for listener in self.listeners:
            listener.feed.disk(keys - self.disk, self.disk - keys)
        self.disk = keys

    @precondition(lambda self: len(self.listeners) < 2)
    @rule()
    def a_listener_comes(self) -> None:
        self.listeners.append(Listener(self.inventory))
        self.listeners[-1].feed.disk(self.disk, ())

    @precondition(lambda self: self.listeners)
    @rule(which=st.integers(0, 1))
    def one_hears(self, which: int) -> None:
        self.listeners[which % len(self.listeners)].hear()

    @precondition(lambda self: self.listeners)
    @rule(which=st.integers(0, 1))
    def one_goes(self, which: int) -> None:
        listener = self.listeners.pop(which % len(self.listeners))
        listener.feed.close()
        listener.feed.close()

    @rule()
    def the_directory_is_told(self) -> None:
        self.inventory.changes(3)

    @rule()
    def who_heard_everything_knows_the_truth(self) -> None:
        for listener in self.listeners:
            while listener.hear():
                pass
            assert listener.dram == {entry.key for entry in self.inventory.entries()}
            assert listener.disk == self.disk

    @invariant()
    def nothing_piles_up(self) -> None:
        self.inventory.check()


Stories.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestStories = Stories.TestCase
