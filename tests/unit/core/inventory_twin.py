"""An inventory beside a model of plain dictionaries and scans: what the state machine and the long random runs drive."""

from __future__ import annotations

from collections import Counter

from core.errors import OutOfBlocksError, PinLimitError
from core.inventory import Inventory
from core.request import AttemptKey

HOLDERS = [AttemptKey("h", n) for n in range(3)]
TENANTS = [b"", b"t", b"u"]


def key(n: int) -> bytes:
    return n.to_bytes(16, "big")


def shared(n: int) -> bool:
    """Whether others hear of a key."""
    return n % 7 != 3


class Twin:
    """An inventory and its model side by side. Each operation does both and compares; misuse is never asked for.

    Model: references of ours, leases as lists, idle blocks with (rank, order), everything by linear scan.
    """

    def __init__(self, total: int, policy: str, share: float) -> None:
        self.now = 0.0
        self.real = Inventory(total, policy=policy, tenant_share=share, clock=lambda: self.now)
        self.total, self.policy = total, policy
        self.limit = max(1, int(total * share)) if share < 1 else total
        self.free = set(range(total))
        self.ours: Counter[int] = Counter()
        self.leases: dict[AttemptKey, tuple[float, list[int]]] = {}
        self.keys: dict[int, bytes] = {}
        self.tenant: dict[int, bytes] = {}
        self.cost: dict[int, float] = {}
        self.hits: Counter[int] = Counter()
        self.rank: dict[int, float] = {}
        self.idle: dict[int, tuple[float, int]] = {}
        self.looked_at: set[int] = set()
        self.parked: set[int] = set()  # looked at too, and still in their place
        self.pinned: set[int] = set()
        self.committed_at: dict[int, float] = {}
        self.idle_since: dict[int, float] = {}
        self.heard: set[bytes] = set()
        self.asked = False
        self.age, self.order, self.evicted, self.asked_to_go = 0.0, 0, 0, 0
        self.generations = {b: self.real.generation(b) for b in range(total)}

    def held(self) -> list[int]:
        return sorted(+self.ours)

    def refs(self, block: int) -> int:
        return self.ours[block] + sum(blocks.count(block) for _, blocks in self.leases.values())

    def block_of(self, k: bytes) -> int | None:
        return next((b for b, resident in self.keys.items() if resident == k), None)

    # -- what a block goes through in the model

    def take(self, block: int) -> None:
        self.idle.pop(block, None)
        self.parked.discard(block)

    def used(self, block: int) -> None:
        self.take(block)
        self.ours[block] += 1
        self.hits[block] += 1
        self.looked_at.discard(block)

    def let_go(self, blocks: list[int]) -> None:
        """Ranks them; references were dropped from the bags by the caller only afterwards."""
        behind = 0.0
        for block in reversed(blocks):
            if block not in self.looked_at | self.parked:
                worth = {"lru": 0.0, "lfu": 1.0, "cost": self.cost.get(block, 0.0)}[self.policy] * (self.hits[block] + 1)
                behind = self.rank[block] = max(behind, self.rank.get(block, 0.0), self.age + worth)

    def rest(self, block: int) -> None:
        if self.refs(block):
            return
        if block not in self.looked_at | self.parked:
            self.idle_since[block] = self.now
        if block not in self.keys:
            self.rank.pop(block, None)
            self.set_free(block)
        elif block in self.parked:
            self.parked.remove(block)
        elif block not in self.pinned:
            self.order += 1
            rank = 0.0 if self.policy == "lru" else self.rank[block]
            self.idle[block] = (rank, -self.order if block in self.looked_at else self.order)
        self.looked_at.discard(block)

    def set_free(self, block: int) -> None:
        self.generations[block] += 1
        self.free.add(block)

    def forget(self, block: int) -> None:
        del self.keys[block], self.tenant[block], self.cost[block], self.committed_at[block]
        self.idle.pop(block, None)
        self.rank.pop(block, None)
        self.hits[block] = 0

    def is_next(self, block: int, tenant: bytes | None, claim: int, gone: Counter[bytes]) -> bool:
        """Whether `block` is a right choice for eviction when blocks of `gone` are to be thought away."""
        self.come_up()
        charged = Counter(self.tenant.values()) - gone
        mine = {self.tenant[b] for b in self.idle.keys() - self.parked}
        over = {t for t in mine if charged[t] > self.limit}
        whose = {self.tenant[block]}
        if over:
            assert whose <= over, "a tenant within its share lost a block before one beyond"
        elif tenant is not None and tenant in mine and charged[tenant] + claim > self.limit:
            assert whose == {tenant}, "a tenant at its share pushed out another's block"
        else:
            whose = mine
        return self.idle[block] == min(
            place for b, place in self.idle.items() if self.tenant[b] in whose and b not in self.parked
        )

    def come_up(self) -> None:
        """Which of the parked ones an eviction passed over is told, not modelled: from then on they go back to the front."""
        passed = self.real._looked_at.keys() & self.parked
        for block in passed:
            self.take(block)
        self.looked_at |= passed

    # -- operations

    def allocate(self, count: int, tenant: bytes | None) -> None:
        room = len(self.free) + len(self.idle) - len(self.parked)
        try:
            blocks = self.real.allocate(count, tenant=tenant)
        except OutOfBlocksError:
            assert count > room
            return
        assert count <= room
        for n, block in enumerate(blocks, 1):
            if self.free:
                assert block in self.free
                self.free.remove(block)
            else:
                assert self.is_next(block, tenant, n, Counter())
                self.age = max(self.age, self.idle[block][0])
                self.forget(block)
                self.evicted += 1
            self.generations[block] += 1
            self.ours[block] += 1

    def commit(self, block: int, n: int, tenant: bytes, cost: float) -> None:
        k = key(n)
        if self.keys.get(block, k) != k:
            return
        resident = self.block_of(k)
        expected = block if resident is None else resident
        if cost:
            assert self.real.commit(block, k, tenant=tenant, cost_s=cost, shared=shared(n)) == expected
        else:
            run = [block]
            assert self.real.commit_run(run, [k], 0, 1, tenant=tenant, shared=shared(n)) is (expected != block)
            assert run == [expected]
        if resident is None:
            self.committed_at.setdefault(block, self.now)
            self.keys[block], self.tenant[block], self.cost[block] = k, tenant, cost
        elif resident != block:
            self.used(resident)
            self.let_go([block])
            self.ours[block] -= 1
            self.rest(block)

    def match(self, numbers: list[int]) -> None:
        found = [self.block_of(key(n)) for n in numbers]
        expected = found[: found.index(None)] if None in found else found
        assert self.real.match([key(n) for n in numbers]) == expected
        for block in expected:
            assert block is not None
            self.used(block)

    def find(self, numbers: list[int]) -> None:
        found = [self.block_of(key(n)) for n in numbers]
        assert self.real.find([key(n) for n in numbers]) == found
        for block in found:
            if block is not None:
                self.used(block)

    def look(self, numbers: list[int]) -> None:
        found = [self.block_of(key(n)) for n in numbers]
        assert self.real.look([key(n) for n in numbers]) == found
        for block in found:
            if block is not None:
                if block in self.idle:
                    self.parked.add(block)
                self.ours[block] += 1

    def retain(self, block: int) -> None:
        self.real.retain([block])
        self.ours[block] += 1

    def release(self, blocks: list[int]) -> None:
        self.real.release(blocks)
        self.let_go(blocks)
        for block in reversed(blocks):
            self.ours[block] -= 1
            self.rest(block)

    def lease(self, holder: AttemptKey, blocks: list[int], length: float) -> None:
        self.real.lease(holder, blocks, self.now + length)
        until, had = self.leases.get(holder, (0.0, []))
        self.leases[holder] = (max(until, self.now + length), had + blocks)

    def renew(self, holder: AttemptKey, length: float) -> None:
        assert self.real.renew(holder, self.now + length) == (holder in self.leases)
        if holder in self.leases:
            until, blocks = self.leases[holder]
            self.leases[holder] = (max(until, self.now + length), blocks)

    def end(self, holder: AttemptKey) -> None:
        assert self.real.end(holder) == (holder in self.leases)
        self.ended(holder)

    def ended(self, holder: AttemptKey) -> None:
        if holder not in self.leases:
            return
        blocks = self.leases[holder][1]
        self.let_go(blocks)
        while blocks:
            self.rest(blocks.pop())
        del self.leases[holder]

    def expire(self, seconds: float) -> None:
        self.now += seconds
        gone = self.real.expire(self.now)
        assert set(gone) == {h for h, (until, _) in self.leases.items() if until <= self.now}
        for holder in gone:
            self.ended(holder)

    def pin(self, numbers: list[int]) -> None:
        blocks = {block for n in numbers if (block := self.block_of(key(n))) is not None}
        fresh = blocks - self.pinned
        try:
            assert self.real.pin([key(n) for n in numbers]) == len(blocks)
        except PinLimitError:
            assert len(self.pinned | fresh) > self.total // 2
            return
        for block in fresh:
            self.looked_at.discard(block)
            self.pinned.add(block)
            self.take(block)
        assert len(self.pinned) <= self.total // 2

    def unpin(self, numbers: list[int]) -> None:
        blocks = list(dict.fromkeys(b for n in numbers if (b := self.block_of(key(n))) in self.pinned and b is not None))
        assert self.real.unpin([key(n) for n in numbers]) == len(blocks)
        self.pinned.difference_update(blocks)
        self.let_go(blocks)
        for block in reversed(blocks):
            self.rest(block)

    def evict(self, numbers: list[int]) -> None:
        blocks = {b for n in numbers if (b := self.block_of(key(n))) in self.idle.keys() - self.parked and b is not None}
        assert self.real.evict([key(n) for n in numbers]) == len(blocks)
        for block in blocks:
            self.forget(block)
            self.set_free(block)
        self.asked_to_go += len(blocks)

    def victims(self, count: int) -> None:
        victims = self.real.victims(count)
        assert len(victims) == min(count, len(self.idle) - len(self.parked))
        self.come_up()
        gone: Counter[bytes] = Counter()
        for victim in victims:
            assert victim.key == self.keys[victim.block]
            assert self.is_next(victim.block, None, 0, gone)
            gone[self.tenant[victim.block]] += 1
            self.take(victim.block)
            self.ours[victim.block] += 1
            self.looked_at.add(victim.block)

    def changes(self, limit: int, everything: bool) -> None:
        added, removed, lost = self.real.changes(limit, everything=everything)
        assert lost == (everything or not self.asked)
        self.asked = True
        self.heard = ((set() if lost else self.heard) - set(removed)) | set(added)
        assert not set(removed) & set(added)
        if len(added) + len(removed) < limit:
            assert self.heard == {k for k in self.keys.values() if shared(int.from_bytes(k, "big"))}

    # -- comparisons

    def agree(self) -> None:
        total, free, cached, active = self.real.counts()
        assert (total, free, cached) == (self.total, len(self.free), len(self.idle) - len(self.parked))
        assert free + cached + active == total
        assert self.real.leases_open() == len(self.leases)
        assert self.real.pinned() == len(self.pinned)
        assert self.real.evictions.for_space == self.evicted
        assert self.real.evictions.idle_s.count == self.evicted + self.asked_to_go

    def agree_throughout(self) -> None:
        self.real.check()
        for block in range(self.total):
            assert self.real.key_of(block) == self.keys.get(block)
            if (key := self.keys.get(block)) is not None:
                assert (self.real.prefix([key, key]), self.real.prefix([key, b"?" * 16, key])) == (2, 1)
            assert self.real.generation(block) == self.generations[block]
        entries = {e.block: (e.key, e.tenant, e.hits, e.references, e.pinned) for e in self.real.entries()}
        assert entries == {b: (k, self.tenant[b], self.hits[b], self.refs(b), b in self.pinned) for b, k in self.keys.items()}
        ages = {e.block: (e.age_s, e.idle_s) for e in self.real.entries()}
        assert ages == {b: (self.now - self.committed_at[b], self.idle_for(b)) for b in self.keys}

    def idle_for(self, block: int) -> float:
        in_use = self.refs(block) and block not in self.looked_at | self.parked
        return 0.0 if in_use else self.now - self.idle_since[block]
