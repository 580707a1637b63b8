"""What an inventory says of itself: states, entries, ages, changes. Nothing here takes a reference or moves a block.

Deciding code.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import takewhile

from core.blocks import BlockKey
from core.inventory_changes import ChangeLog, Changes
from core.inventory_table import BlockCounts, BlockTable, Entry
from core.request import AttemptKey


class TableView(BlockTable):
    """The questions to a table, each answered under its lock."""

    def changes(self, limit: int, *, everything: bool = False, log: ChangeLog | None = None) -> Changes:
        """What became resident and what left since the last call, `limit` keys at most; the rest comes with the next call.

        For one reader, and for each that has a log of its own from `follow`. An addition and a removal of one key cancel out.
        The first call, and one that asks for `everything`, begin anew with all that is resident: see `Changes.lost`.
        """
        assert limit > 0, "a limit of nothing would never get anywhere"
        with self._lock:
            unshared = self._unshared
            resident = (key for key, block in self._by_key.items() if block not in unshared) if unshared else self._by_key
            return (self._log if log is None else log).take(limit, resident, everything)

    def entries(self) -> list[Entry]:
        """All resident blocks, in the order in which they were committed."""
        with self._lock:  # copies, so that nobody waits while the list is made
            by_key, pinned, committed_at = list(self._by_key.items()), self._pinned.copy(), self._committed_at[:]
            digest, tenant, hits = list(self._digest), list(self._tenant), list(self._hits)
            cost_s, refs = list(self._cost_s), list(self._refs)
            idle_since, looked_at, now = self._idle.since(), self._looked_at.copy(), self._now()
        idle_since |= {block: since for block, since in pinned.items() if not refs[block]} | looked_at
        return [
            Entry(
                key,
                b,
                digest[b],
                tenant[b],
                hits[b],
                cost_s[b],
                refs[b],
                b in pinned,
                now - committed_at[b],
                now - idle_since.get(b, now),
            )
            for key, b in by_key
        ]

    def generation(self, block: int) -> int:
        """Changes whenever the block is handed out again or freed."""
        with self._lock:
            return self._generation[block]

    def digest(self, block: int) -> int:
        """xxh3-64 of the block's bytes as last set, 0 when unknown."""
        with self._lock:
            return self._digest[block]

    def has(self, key: BlockKey) -> bool:
        """Whether the key is resident; to ask is no use."""
        with self._lock:
            return key in self._by_key

    def prefix(self, keys: Iterable[BlockKey]) -> int:
        """How many of `keys`, from the first on, are resident; to ask is no use."""
        with self._lock:
            return len(list(takewhile(self._by_key.__contains__, keys)))

    def key_of(self, block: int) -> BlockKey | None:
        """The key a block is findable under, None while it is uncommitted."""
        with self._lock:
            return self._key[block]

    def tenant_of(self, block: int) -> bytes:
        """Whom a committed block is charged to."""
        with self._lock:
            return self._tenant[block]

    def cost_of(self, block: int) -> float:
        """What computing a committed block again takes, in seconds; 0 when nobody said."""
        with self._lock:
            return self._cost_s[block]

    def tenants(self) -> dict[bytes, int]:
        """Committed blocks by tenant; empty without shares."""
        with self._lock:
            return {} if self._shares is None else self._shares.charged()

    def counts(self) -> BlockCounts:
        with self._lock:
            free, cached = len(self._free), len(self._idle) - len(self._parked)
            return BlockCounts(self._total, free, cached, self._total - free - cached)

    def leases_open(self) -> int:
        with self._lock:
            return len(self._leases)

    def references(self) -> list[int]:
        """How many each block has, by its number, those of leases included. For audits."""
        with self._lock:
            return list(self._refs)

    def leases(self) -> dict[AttemptKey, list[int]]:
        """Holders and what their leases hold. For audits."""
        with self._lock:
            return self._leases.held()

    def check(self) -> None:
        """Asserts every invariant of the table; time in proportion to its size, so for idle moments and tests."""
        with self._lock:
            self._check_states()
            self._check_keys()
            self._leases.check(self._refs)

    def pinned(self) -> int:
        """Blocks that are pinned, held or not."""
        with self._lock:
            return len(self._pinned)

    def pinned_keys(self) -> list[BlockKey]:
        with self._lock:
            return [key for block in self._pinned if (key := self._key[block]) is not None]

    @property
    def pinned_max(self) -> int:
        """Blocks that can be."""
        return self._pinned_max
