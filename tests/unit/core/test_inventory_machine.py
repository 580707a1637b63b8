"""The table of blocks against a model: small ones move by move, large ones at length, and under many threads."""

from __future__ import annotations

import random
import threading

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from inventory_twin import HOLDERS, TENANTS, Twin, key

from core.errors import OutOfBlocksError
from core.eviction import POLICIES
from core.inventory import Inventory
from core.request import AttemptKey

NUMBERS = st.integers(0, 7)
MANY = st.lists(NUMBERS, max_size=4)
HOLDER = st.sampled_from(HOLDERS)
TENANT = st.sampled_from(TENANTS)
COST = st.sampled_from([0.0, 0.5, 1.0, 8.0])


class InventoryMachine(RuleBasedStateMachine):
    @initialize(policy=st.sampled_from(POLICIES), share=st.sampled_from([1.0, 0.4]))
    def start(self, policy: str, share: float) -> None:
        self.twin = Twin(6, policy, share)

    def some(self, data: st.DataObject, most: int = 4) -> list[int]:
        return data.draw(st.lists(st.sampled_from(self.twin.held()), unique=True, max_size=most))

    @rule(count=st.integers(0, 4), tenant=st.none() | TENANT)
    def allocate(self, count: int, tenant: bytes | None) -> None:
        self.twin.allocate(count, tenant)

    @precondition(lambda self: self.twin.held())
    @rule(data=st.data(), n=NUMBERS, tenant=TENANT, cost=COST)
    def commit(self, data: st.DataObject, n: int, tenant: bytes, cost: float) -> None:
        self.twin.commit(data.draw(st.sampled_from(self.twin.held())), n, tenant, cost)

    @rule(kind=st.sampled_from(["match", "find", "look", "pin", "unpin", "evict"]), numbers=MANY)
    def by_key(self, kind: str, numbers: list[int]) -> None:
        getattr(self.twin, kind)(numbers)

    @precondition(lambda self: self.twin.held())
    @rule(data=st.data())
    def retain(self, data: st.DataObject) -> None:
        self.twin.retain(data.draw(st.sampled_from(self.twin.held())))

    @precondition(lambda self: self.twin.held())
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.twin.release(self.some(data))

    @precondition(lambda self: self.twin.held())
    @rule(data=st.data(), holder=HOLDER, length=st.floats(0.5, 5))
    def lease(self, data: st.DataObject, holder: AttemptKey, length: float) -> None:
        self.twin.lease(holder, self.some(data, 3), length)

    @rule(holder=HOLDER, length=st.floats(0.5, 5))
    def renew(self, holder: AttemptKey, length: float) -> None:
        self.twin.renew(holder, length)

    @rule(holder=HOLDER)
    def end(self, holder: AttemptKey) -> None:
        self.twin.end(holder)

    @rule(seconds=st.floats(0, 3))
    def expire(self, seconds: float) -> None:
        self.twin.expire(seconds)

    @rule(count=st.integers(0, 4))
    def victims(self, count: int) -> None:
        self.twin.victims(count)

    @rule(limit=st.integers(1, 8), everything=st.sampled_from([False, False, False, True]))
    def changes(self, limit: int, everything: bool) -> None:
        self.twin.changes(limit, everything)

    @invariant()
    def agree(self) -> None:
        self.twin.agree()
        self.twin.agree_throughout()


InventoryMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestInventory = InventoryMachine.TestCase


def one_step(twin: Twin, rng: random.Random) -> None:
    """A random operation, likelier to let go of blocks when many are held."""

    def numbers() -> list[int]:
        first, count = rng.randrange(60), rng.randrange(6)
        return list(range(first, first + count))

    held, move = twin.held(), rng.randrange(20)
    some = rng.sample(held, min(len(held), rng.randrange(1, 7)))
    if move < 4:
        twin.allocate(rng.randrange(5), rng.choice([None, *TENANTS]))
    elif move < 8 and held:
        for n, block in zip(numbers(), some, strict=False):
            twin.commit(block, n, rng.choice(TENANTS), rng.choice([0.0, 0.5, 1.0, 8.0]))
    elif move < 10:
        getattr(twin, rng.choice(["match", "find", "look"]))(numbers())
    elif move < 14:
        twin.release(held if len(held) > 16 else some)
    elif move == 14:
        twin.lease(rng.choice(HOLDERS), some, rng.uniform(0.5, 5))
    elif move == 15:
        twin.renew(rng.choice(HOLDERS), rng.uniform(0.5, 5))
    elif move == 16:
        twin.end(rng.choice(HOLDERS)) if rng.random() < 0.5 else twin.expire(rng.uniform(0, 2))
    elif move == 17:
        getattr(twin, rng.choice(["pin", "unpin", "unpin", "evict"]))(numbers())
    elif move == 18:
        twin.victims(rng.randrange(4))
    else:
        twin.changes(rng.randrange(1, 40), rng.random() < 0.02)


@pytest.mark.parametrize(("policy", "share", "seed"), [(p, s, i) for i, p in enumerate(POLICIES) for s in (1.0, 0.3)])
def test_ten_thousand_random_operations_leave_nothing_behind(policy: str, share: float, seed: int) -> None:
    twin, rng = Twin(40, policy, share), random.Random(seed)
    for n in range(10_000):
        one_step(twin, rng)
        twin.agree()
        if n % 50 == 0:
            twin.agree_throughout()
    assert twin.evicted > 300, "the run never got to what it is for"
    for holder in HOLDERS:
        twin.end(holder)
    while held := twin.held():
        twin.release(held)
    twin.unpin(list(range(100)))
    twin.agree_throughout()
    assert twin.real.counts().active == 0
    twin.changes(1000, False)


def test_many_threads_leave_nothing_behind_and_never_share_an_uncommitted_block() -> None:
    inventory = Inventory(48)
    owner: list[int | None] = [None] * 48
    failures: list[BaseException] = []

    def work(me: int) -> None:
        rng = random.Random(me)
        try:
            for n in range(300):
                one_request(rng, me, AttemptKey(f"t{me}", n))
        except BaseException as error:
            failures.append(error)

    def one_request(rng: random.Random, me: int, holder: AttemptKey) -> None:
        prompt = [key(rng.randrange(4) * 8 + i) for i in range(rng.randrange(1, 6))]
        held = inventory.match(prompt)
        try:
            fresh = inventory.allocate(len(prompt) - len(held) + 1)
        except OutOfBlocksError:
            inventory.release(held)
            return
        for block in fresh:
            assert owner[block] is None, "handed to two owners"
            owner[block] = me
        for i, block in enumerate(fresh[:-1]):
            owner[block] = None  # from here on it may be shared
            held.append(inventory.commit(block, prompt[len(prompt) - len(fresh) + 1 + i]))
        inventory.lease(holder, held, until=rng.random())
        owner[fresh[-1]] = None
        inventory.release([*held, fresh[-1]])
        if rng.random() < 0.5:
            inventory.end(holder)
        else:
            inventory.expire(rng.random())

    threads = [threading.Thread(target=work, args=(me,)) for me in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert not any(thread.is_alive() for thread in threads)
    assert not failures, failures
    inventory.expire(1.0)
    inventory.check()
    assert inventory.leases_open() == 0
    assert inventory.counts().active == 0
