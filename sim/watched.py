"""Inventories and tables of attempts that note what was touched, so that rules are looked at where something changed.

What they do is what the shipped ones do. A rule that held of everything, and then of all that was touched, holds of
everything; `sim.checks` looks at everything now and then all the same, for what was changed behind their backs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from core.blocks import BlockKey
from core.inventory import Inventory
from core.inventory_table import Victim
from core.request import AttemptKey
from worker.attempts import Admitted, AttemptTable, Peer, Refused


class Books:
    """Where workers get what they keep book in: the shipped ones."""

    def inventory(self, name: str, num_blocks: int, policy: str, tenant_share: float) -> Inventory:
        return Inventory(num_blocks, policy=policy, tenant_share=tenant_share, clock=None)

    def table(self, name: str) -> AttemptTable:
        return AttemptTable()


class WatchedBooks(Books):
    """`stirred`: names of the workers whose books were changed since somebody emptied it, in the order in which they were."""

    def __init__(self) -> None:
        self.stirred: dict[str, None] = {}

    def inventory(self, name: str, num_blocks: int, policy: str, tenant_share: float) -> Inventory:
        return WatchedInventory(num_blocks, self._stir(name), policy=policy, tenant_share=tenant_share, clock=None)

    def table(self, name: str) -> AttemptTable:
        return WatchedTable(self._stir(name))

    def _stir(self, name: str) -> Callable[[], None]:
        return lambda: self.stirred.setdefault(name)


class WatchedInventory(Inventory):
    """`stir` is called with every change; `touched` are the blocks that changed since somebody emptied it."""

    def __init__(self, num_blocks: int, stir: Callable[[], None], **options: Any) -> None:
        super().__init__(num_blocks, **options)
        self.touched: set[int] = set()
        self._stir = stir

    def check_touched(self) -> None:
        """Asserts the invariants of the blocks that were touched, and the counts of all."""
        with self._lock:
            self._check_blocks(self.touched)
        self.touched.clear()

    def _note(self, blocks: Iterable[int]) -> None:
        self.touched.update(blocks)
        self._stir()

    def _note_all(self) -> None:
        self._note(range(self._total))

    def allocate(self, count: int, *, tenant: bytes | None = None) -> list[int]:
        blocks = super().allocate(count, tenant=tenant)
        self._note(blocks)
        return blocks

    def commit(self, block: int, key: BlockKey, *args: Any, **options: Any) -> int:
        used = super().commit(block, key, *args, **options)
        self._note((block, used))
        return used

    def commit_run(self, blocks: list[int], keys: Sequence[BlockKey], first: int, last: int, **options: Any) -> bool:
        self._note(blocks[first:last])
        swapped = super().commit_run(blocks, keys, first, last, **options)
        self._note(blocks[first:last])
        return swapped

    def match(self, keys: Sequence[BlockKey]) -> list[int]:
        found = super().match(keys)
        self._note(found)
        return found

    def find(self, keys: Sequence[BlockKey]) -> list[int | None]:
        found = super().find(keys)
        self._note(block for block in found if block is not None)
        return found

    def look(self, keys: Sequence[BlockKey]) -> list[int | None]:
        found = super().look(keys)
        self._note(block for block in found if block is not None)
        return found

    def retain(self, blocks: Iterable[int]) -> None:
        blocks = list(blocks)
        super().retain(blocks)
        self._note(blocks)

    def release(self, blocks: Sequence[int]) -> None:
        super().release(blocks)
        self._note(blocks)

    def lease(self, holder: AttemptKey, blocks: Iterable[int], until: float) -> None:
        blocks = list(blocks)
        super().lease(holder, blocks, until)
        self._note(blocks)

    def end(self, holder: AttemptKey) -> bool:
        held = self._leases.of(holder)
        ended = super().end(holder)
        self._note(held)
        return ended

    def expire(self, now: float) -> list[AttemptKey]:
        held = self._leases.held()
        expired = super().expire(now)
        for holder in expired:
            self._note(held[holder])
        return expired

    def pin(self, keys: Iterable[BlockKey]) -> int:
        self._note_all()
        return super().pin(keys)

    def unpin(self, keys: Sequence[BlockKey]) -> int:
        self._note_all()
        return super().unpin(keys)

    def evict(self, keys: Iterable[BlockKey]) -> int:
        self._note_all()
        return super().evict(keys)

    def victims(self, count: int) -> list[Victim]:
        found = super().victims(count)
        self._note(victim.block for victim in found)
        return found


class WatchedTable(AttemptTable):
    """As `WatchedInventory`, of attempts."""

    __slots__ = ("_stir", "touched")

    def __init__(self, stir: Callable[[], None]) -> None:
        super().__init__()
        self.touched: set[AttemptKey] = set()
        self._stir = stir

    def admit(self, key: AttemptKey, owner: Peer, now: float) -> Admitted | Refused:
        self._note(key)
        return AttemptTable.admit(self, key, owner, now)

    def end(self, key: AttemptKey, now: float) -> bool:
        self._note(key)
        return AttemptTable.end(self, key, now)

    def check_touched(self) -> None:
        """Asserts that the two indexes agree about what was touched, and in number."""
        for key in self.touched:
            owner = self.owner(key)
            for peer, keys in self._owned.items():
                assert (key in keys) == (peer == owner), f"{key} is owned by {owner}, and listed among those of {peer}"
        assert sum(map(len, self._owned.values())) == len(self._live), "the two indexes of attempts differ"
        assert all(self._owned.values()), "a peer without attempts is not remembered"
        assert self._orphaned_until.keys() <= self._owned.keys(), "a broken session is remembered for nothing"
        assert len(self._fences) <= self.max_fences, "too many fences"
        self.touched.clear()

    def _note(self, key: AttemptKey) -> None:
        self.touched.add(key)
        self._stir()
