"""Eviction policies: what goes first, and that no prefix goes before its tail."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import OutOfBlocksError
from core.eviction import POLICIES, RankQueue, Ranks
from core.inventory import Inventory


def key(n: int) -> bytes:
    return n.to_bytes(16, "big")


def put(inventory: Inventory, n: int, cost_s: float = 0.0, tenant: bytes = b"") -> None:
    (block,) = inventory.allocate(1)
    inventory.release([inventory.commit(block, key(n), cost_s=cost_s, tenant=tenant)])


def use(inventory: Inventory, n: int, times: int = 1) -> bool:
    for _ in range(times):
        found = inventory.match([key(n)])
        inventory.release(found)
        if not found:
            return False
    return True


def resident(inventory: Inventory) -> set[int]:
    return {int.from_bytes(entry.key, "big") for entry in inventory.entries()}


@pytest.mark.parametrize(
    ("policy", "survivors"),
    [
        ("lru", {3, 4, 9}),  # 1 and 2 were used longest ago
        ("lfu", {1, 2, 9}),  # 3 and 4 were used least
        ("cost", {1, 3, 9}),  # 2 and 4 are quickly computed again, however often they are used
    ],
)
def test_each_policy_gives_up_something_else(policy: str, survivors: set[int]) -> None:
    inventory = Inventory(4, policy=policy)
    for n, cost_s in [(1, 1.0), (2, 0.01), (3, 1.0), (4, 0.01)]:
        put(inventory, n, cost_s)
    for n, times in [(1, 3), (2, 3), (3, 1), (4, 1)]:
        use(inventory, n, times)
    inventory.allocate(1)
    put(inventory, 9, 1.0)
    assert resident(inventory) == survivors


@pytest.mark.parametrize("policy", ["lfu", "cost"])
def test_an_old_favourite_does_not_stay_for_ever(policy: str) -> None:
    inventory = Inventory(4, policy=policy)
    put(inventory, 0, 1.0)
    use(inventory, 0, times=20)
    new = iter(range(1, 1000))
    for _ in range(30):  # a plain count of uses would keep it through all of these
        put(inventory, next(new), 1.0)
    assert 0 in resident(inventory), "and it is not forgotten at once either"
    for _ in range(60):
        put(inventory, next(new), 1.0)
    assert 0 not in resident(inventory)


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_known_of_costs_makes_every_policy_evict_what_was_let_go_first(policy: str) -> None:
    inventory = Inventory(4, policy=policy)
    for n in range(6):
        put(inventory, n)
    assert resident(inventory) == {2, 3, 4, 5}


def test_stale_places_do_not_pile_up_in_the_heap() -> None:
    queue = RankQueue(Ranks([0] * 8, None))
    for _ in range(1000):
        queue.add(3, 0.0)
        assert queue.remove(3) == 0.0
    assert len(queue) == 0
    assert len(queue._heap) < 100
    with pytest.raises(KeyError):
        queue.remove(3)


class Conversations:
    """Requests over a tree of prompts, as the engine turns them into calls: match, allocate, commit, release."""

    def __init__(self, policy: str, share: float) -> None:
        self.inventory = Inventory(12, policy=policy, tenant_share=share)
        self.parent: dict[bytes, bytes | None] = {}
        self.running: deque[list[int]] = deque()

    def start(self, path: list[int]) -> None:
        keys: list[bytes] = []
        number = path[0] % 2 + 1
        tenant = b"t%d" % number
        for step in path:
            number = number * 4 + step
            keys.append(key(number))
            self.parent[keys[-1]] = keys[-2] if len(keys) > 1 else None
        held = self.inventory.match(keys)
        try:
            fresh = self.inventory.allocate(len(keys) - len(held), tenant=tenant)
        except OutOfBlocksError:
            self.inventory.release(held)
            return
        for i, block in enumerate(fresh, len(held)):
            cost_s = 1.0 + i * 0.7 + (number % 3)  # later blocks attend to more
            held.append(self.inventory.commit(block, keys[i], tenant=tenant, cost_s=cost_s))
        self.running.append(held)

    def finish(self, which: int) -> None:
        if self.running:
            self.running.rotate(which)
            self.inventory.release(self.running.popleft())

    def look(self, count: int) -> None:
        victims = self.inventory.victims(count)
        self.inventory.release([victim.block for victim in victims])

    def check(self) -> None:
        self.inventory.check()
        here = {entry.key for entry in self.inventory.entries()}
        orphans = [k.hex() for k in here if self.parent[k] is not None and self.parent[k] not in here]
        assert not orphans, "a prefix was evicted before its tail"


PATHS = st.lists(st.integers(0, 2), min_size=1, max_size=6)
MOVES = st.one_of(
    st.tuples(st.just("start"), PATHS),
    st.tuples(st.just("start"), PATHS),
    st.tuples(st.just("finish"), st.integers(0, 3)),
    st.tuples(st.just("finish"), st.integers(0, 3)),
    st.tuples(st.just("look"), st.integers(1, 4)),
)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("share", [1.0, 0.5])
@settings(max_examples=30, deadline=None)
@given(moves=st.lists(MOVES, max_size=60))
def test_no_prefix_is_evicted_before_its_tail(policy: str, share: float, moves: list[tuple[str, list[int] | int]]) -> None:
    talk = Conversations(policy, share)
    for move, argument in moves:
        getattr(talk, move)(argument)
        talk.check()


def test_a_tenant_beyond_its_share_gives_way_first_and_may_use_what_nobody_wants() -> None:
    inventory = Inventory(8, tenant_share=0.5)
    for n in range(6):
        put(inventory, n, tenant=b"big")
    for n in (10, 11):
        put(inventory, n, tenant=b"small")
    assert inventory.tenants() == {b"big": 6, b"small": 2}
    use(inventory, 0)  # the youngest of all: it goes only when its tenant has nothing older
    for n in (12, 13):
        put(inventory, n, tenant=b"small")
    assert resident(inventory) == {0, 3, 4, 5, 10, 11, 12, 13}
    put(inventory, 14, tenant=b"third")  # all within their shares: the policy decides
    assert resident(inventory) == {0, 4, 5, 10, 11, 12, 13, 14}
    inventory.check()


@pytest.mark.parametrize("policy", POLICIES)
def test_what_a_tenant_takes_beyond_its_share_comes_from_its_own(policy: str) -> None:
    inventory = Inventory(8, policy=policy, tenant_share=0.5)
    for n in range(4):
        put(inventory, n, 1.0, tenant=b"victim")
    for n in range(100, 150):
        (block,) = inventory.allocate(1, tenant=b"greedy")
        inventory.release([inventory.commit(block, key(n), tenant=b"greedy", cost_s=1.0)])
    assert inventory.tenants() == {b"victim": 4, b"greedy": 4}
    assert resident(inventory) >= {0, 1, 2, 3}


def test_a_tenant_that_does_not_say_who_it_is_before_it_commits_gives_back_what_it_took() -> None:
    inventory = Inventory(8, tenant_share=0.5)
    for n in range(4):
        put(inventory, n, tenant=b"victim")
    for n in range(100, 150):
        put(inventory, n, tenant=b"greedy")
    assert inventory.tenants() == {b"victim": 3, b"greedy": 5}  # one more than its share, once


def test_active_blocks_count_towards_a_share() -> None:
    inventory = Inventory(4, tenant_share=0.5)
    held = [inventory.commit(b, key(n), tenant=b"t") for n, b in enumerate(inventory.allocate(2))]
    put(inventory, 8, tenant=b"u")
    put(inventory, 9, tenant=b"t")
    inventory.allocate(1)
    assert resident(inventory) == {0, 1, 8}, "the tenant with two blocks in use lost its third, the younger"
    inventory.release(held)
    inventory.check()
