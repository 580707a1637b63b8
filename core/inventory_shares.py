"""Shares of an inventory by tenant. Deciding code; the inventory serialises all calls.

Shares are soft while there is room: a tenant may fill blocks that nobody else wants. When blocks run out, those of
tenants over their share go first, whatever the policy says of others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from core.eviction import IdleQueue


class SharedQueue:
    """An IdleQueue that keeps a queue per tenant beside the one of all, so that each operation costs twice the policy's.

    `tenants` is the inventory's column of whose block is whose; `limit` is how many committed blocks, idle or in use, a
    tenant may have before it is over its share. Whoever commits a block charges it; what is popped is evicted and no
    longer charged.
    """

    def __init__(self, make_queue: Callable[[], IdleQueue], tenants: Sequence[bytes], limit: int) -> None:
        self._make_queue = make_queue
        self._all = make_queue()
        self._own: dict[bytes, IdleQueue] = {}  # never empty ones
        self._tenants = tenants
        self._limit = limit
        self._charged: dict[bytes, int] = {}
        self._over: dict[bytes, None] = {}  # over their share and with something idle, the longest so first

    def __len__(self) -> int:
        return len(self._all)

    def __contains__(self, block: object) -> bool:
        return block in self._all

    def charge(self, tenant: bytes, count: int) -> None:
        """`count` more (or fewer) blocks are committed for the tenant."""
        charged = self._charged[tenant] = self._charged.get(tenant, 0) + count
        if not charged:
            del self._charged[tenant]
        self._settle(tenant)

    def charged(self) -> dict[bytes, int]:
        """Committed blocks by tenant."""
        return dict(self._charged)

    def add(self, block: int, since: float) -> None:
        self._all.add(block, since)
        self._own_queue(block).add(block, since)
        self._settle(self._tenants[block])

    def add_first(self, block: int, since: float) -> None:
        self._all.add_first(block, since)
        self._own_queue(block).add_first(block, since)
        self._settle(self._tenants[block])

    def remove(self, block: int) -> float:
        since = self._all.remove(block)
        tenant = self._tenants[block]
        self._own[tenant].remove(block)
        self._settle(tenant)
        return since

    def since(self) -> dict[int, float]:
        return self._all.since()

    def next(self) -> int:
        return self._own[next(iter(self._over))].next() if self._over else self._all.next()

    def pop(self) -> tuple[int, float]:
        if self._over:
            return self._pop_own(next(iter(self._over)))
        block, since = self._all.pop()
        tenant = self._tenants[block]
        self._own[tenant].remove(block)
        self.charge(tenant, -1)
        return block, since

    def pop_for(self, tenant: bytes, claim: int) -> tuple[int, float]:
        """As `pop`, so that `tenant` gets `claim` blocks more: its own block if that takes it beyond its share."""
        beyond = self._charged.get(tenant, 0) + claim > self._limit
        if beyond and tenant in self._own and (tenant in self._over or not self._over):
            return self._pop_own(tenant)
        return self.pop()

    def _pop_own(self, tenant: bytes) -> tuple[int, float]:
        block, since = self._own[tenant].pop()
        self._all.remove(block)
        self.charge(tenant, -1)
        return block, since

    def _own_queue(self, block: int) -> IdleQueue:
        tenant = self._tenants[block]
        queue = self._own.get(tenant)
        if queue is None:
            queue = self._own[tenant] = self._make_queue()
        return queue

    def _settle(self, tenant: bytes) -> None:
        queue = self._own.get(tenant)
        if queue is not None and not len(queue):
            del self._own[tenant]
            queue = None
        if queue is not None and self._charged.get(tenant, 0) > self._limit:
            self._over[tenant] = None
        else:
            self._over.pop(tenant, None)

    def check(self, tenants: Sequence[bytes]) -> None:
        """Asserts that charges are those of the committed blocks (`tenants`, one per block) and that the queues agree."""
        counted: dict[bytes, int] = {}
        for tenant in tenants:
            counted[tenant] = counted.get(tenant, 0) + 1
        assert counted == self._charged, "tenants are charged for what is not committed, or not for what is"
        assert sum(map(len, self._own.values())) == len(self._all), "the queues of the tenants are not the queue of all"
        assert all(map(len, self._own.values())), "a tenant with nothing idle has a queue"
        over = {tenant for tenant in self._own if counted.get(tenant, 0) > self._limit}
        assert over == self._over.keys(), "who is over its share is not known"
