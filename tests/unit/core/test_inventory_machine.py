"""The table of blocks against a model that keeps a plain bag of references, and under many threads."""

from __future__ import annotations

import random
import threading
from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from core.errors import OutOfBlocksError
from core.inventory import Inventory
from core.request import AttemptKey

TOTAL = 6
NUMBERS = st.integers(0, 7)
HOLDERS = st.sampled_from([AttemptKey("h", n) for n in range(3)])


def key(n: int) -> bytes:
    return n.to_bytes(16, "big")


class InventoryMachine(RuleBasedStateMachine):
    """Model: references of ours, leases as lists, cache as a list in order of release."""

    def __init__(self) -> None:
        super().__init__()
        self.real = Inventory(TOTAL)
        self.ours: Counter[int] = Counter()
        self.leases: dict[AttemptKey, tuple[float, list[int]]] = {}
        self.keys: dict[int, bytes] = {}
        self.cache: list[int] = []
        self.generations = {b: self.real.generation(b) for b in range(TOTAL)}
        self.now = 0.0

    def refs(self) -> Counter[int]:
        return sum((Counter(blocks) for _, blocks in self.leases.values()), +self.ours)

    def held(self) -> list[int]:
        return sorted(+self.ours)

    def drop(self, blocks: list[int], bag: Counter[int]) -> None:
        """Last first, as a release does."""
        for block in reversed(blocks):
            if bag is self.ours:
                bag[block] -= 1
            if not self.refs()[block] and block in self.keys:
                self.cache.append(block)

    def take(self, block: int) -> None:
        if block in self.cache:
            self.cache.remove(block)
        self.ours[block] += 1

    @rule(count=st.integers(0, 4))
    def allocate(self, count: int) -> None:
        free = TOTAL - len(+self.refs()) - len(self.cache)
        try:
            blocks = self.real.allocate(count)
        except OutOfBlocksError:
            assert count > free + len(self.cache)
            return
        assert count <= free + len(self.cache)
        evicted = self.cache[: max(0, count - free)]
        assert set(blocks) >= set(evicted), "the oldest are evicted first"
        for block in evicted:
            self.cache.remove(block)
            del self.keys[block]
        for block in blocks:
            assert block not in +self.refs()
            assert block not in self.keys
            assert self.real.generation(block) > self.generations[block]
            self.ours[block] += 1

    @precondition(lambda self: self.held())
    @rule(data=st.data(), n=NUMBERS)
    def commit(self, data: st.DataObject, n: int) -> None:
        block = data.draw(st.sampled_from(self.held()))
        if self.keys.get(block, key(n)) != key(n):
            return
        resident = next((b for b, k in self.keys.items() if k == key(n)), None)
        canonical = self.real.commit(block, key(n))
        assert canonical == (block if resident is None else resident)
        self.keys[canonical] = key(n)
        if canonical != block:
            self.take(canonical)
            self.drop([block], self.ours)

    @rule(numbers=st.lists(NUMBERS, max_size=4))
    def match(self, numbers: list[int]) -> None:
        expected = []
        for n in numbers:
            block = next((b for b, k in self.keys.items() if k == key(n)), None)
            if block is None:
                break
            expected.append(block)
            self.take(block)
        assert self.real.match([key(n) for n in numbers]) == expected

    @precondition(lambda self: self.held())
    @rule(data=st.data())
    def retain(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.held()))
        self.real.retain([block])
        self.ours[block] += 1

    @precondition(lambda self: self.held())
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        blocks = data.draw(st.lists(st.sampled_from(self.held()), unique=True, max_size=4))
        self.real.release(blocks)
        self.drop(blocks, self.ours)

    @precondition(lambda self: self.held())
    @rule(data=st.data(), holder=HOLDERS, length=st.floats(0.5, 5))
    def lease(self, data: st.DataObject, holder: AttemptKey, length: float) -> None:
        blocks = data.draw(st.lists(st.sampled_from(self.held()), max_size=3))
        self.real.lease(holder, blocks, self.now + length)
        until, had = self.leases.get(holder, (0.0, []))
        self.leases[holder] = (max(until, self.now + length), had + blocks)

    @rule(holder=HOLDERS, length=st.floats(0.5, 5))
    def renew(self, holder: AttemptKey, length: float) -> None:
        assert self.real.renew(holder, self.now + length) == (holder in self.leases)
        if holder in self.leases:
            until, blocks = self.leases[holder]
            self.leases[holder] = (max(until, self.now + length), blocks)

    @rule(holder=HOLDERS)
    def end(self, holder: AttemptKey) -> None:
        assert self.real.end(holder) == (holder in self.leases)
        self.end_in_model(holder)

    def end_in_model(self, holder: AttemptKey) -> None:
        _, blocks = self.leases.pop(holder, (0.0, []))
        for i in range(len(blocks) - 1, -1, -1):
            if not self.refs()[blocks[i]] and blocks[i] not in blocks[:i] and blocks[i] in self.keys:
                self.cache.append(blocks[i])

    @rule(seconds=st.floats(0, 3))
    def expire(self, seconds: float) -> None:
        self.now += seconds
        gone = self.real.expire(self.now)
        assert set(gone) == {h for h, (until, _) in self.leases.items() if until <= self.now}
        for holder in gone:
            self.end_in_model(holder)

    @invariant()
    def agree(self) -> None:
        self.real.check()
        total, free, cached, active = self.real.counts()
        assert (total, cached, active) == (TOTAL, len(self.cache), len(+self.refs()))
        assert free + cached + active == total
        assert self.real.leases_open() == len(self.leases)
        for block in range(TOTAL):
            assert self.real.key_of(block) == self.keys.get(block)
            generation = self.real.generation(block)
            if block in self.keys and self.keys.get(block) == self.seen.get(block):
                assert generation == self.generations[block], "a committed block changed its generation"
            assert generation >= self.generations[block]
            self.generations[block] = generation
        self.seen = dict(self.keys)

    seen: dict[int, bytes] = {}  # noqa: RUF012  replaced, never changed


InventoryMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestInventory = InventoryMachine.TestCase


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
