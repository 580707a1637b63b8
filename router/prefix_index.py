"""Which node probably holds which block: longest-prefix lookup over all nodes at once. Deciding code.

Nodes are bits of an integer; a key maps to the set of its holders, and most neighbours in a prompt have the same set. So a
lookup fetches the sets of all keys at once and intersects where they change: 2,000 keys over 1,000 nodes in a fraction of a
millisecond. Like the directory it is a hint: what it does not know costs a prefix that is computed again, what it wrongly
believes costs a miss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from core.blocks import BlockKey
from router.key_table import NOTHING, KeyTable, short_keys

BLOCKS_MAX = 4_000_000
SETS_MAX = 65_536


class Match(NamedTuple):
    """Blocks of the prefix that each node holds, for those that hold any; `best` is the longest."""

    blocks: dict[str, int]
    best: int


class PrefixIndex:
    """One per tier. `blocks_max` keys at most: beyond them the ones that were learned first are forgotten."""

    def __init__(self, blocks_max: int = BLOCKS_MAX) -> None:
        self._table = KeyTable(blocks_max)
        self._sets: list[int] = [0]  # by number; NOTHING is the empty set
        self._number: dict[int, int] = {0: NOTHING}
        self._slot: dict[str, int] = {}
        self._name: dict[int, str] = {}
        self._alive = 0
        self._free: list[int] = []

    def __len__(self) -> int:
        return len(self._table)

    @property
    def nbytes(self) -> int:
        """Of the table; the sets are few."""
        return self._table.nbytes

    def added(self, node: str, keys: Sequence[BlockKey]) -> None:
        bit = 1 << self._slot_of(node)
        self._update(keys, lambda held: held | bit)

    def removed(self, node: str, keys: Sequence[BlockKey]) -> None:
        slot = self._slot.get(node)
        if slot is not None:
            self._update(keys, lambda held: held & ~(1 << slot))

    def forget(self, node: str) -> None:
        """Everything the node held. Costs time in proportion to the table: nodes rarely go."""
        slot = self._slot.pop(node, None)
        if slot is None:
            return
        del self._name[slot]
        self._alive &= ~(1 << slot)
        self._free.append(slot)
        self._rename([self._number_of(held & ~(1 << slot)) for held in list(self._sets)])

    def resync(self, node: str, keys: Sequence[BlockKey]) -> None:
        """The node's whole truth takes the place of what was known of it."""
        self.forget(node)
        self.added(node, keys)

    def match(self, keys: Sequence[BlockKey]) -> Match:
        """How far into `keys` each node's blocks reach without a gap."""
        if not keys or not self._alive:
            return Match({}, 0)
        numbers = self._table.get(short_keys(keys))
        edges = np.flatnonzero(numbers[1:] != numbers[:-1]) + 1
        blocks: dict[str, int] = {}
        mask = self._alive
        for depth in (0, *edges.tolist()):
            kept = mask & self._sets[numbers[depth]]
            if depth and kept != mask:
                self._note(mask & ~kept, depth, blocks)
            mask = kept
            if not mask:
                break
        self._note(mask, len(keys), blocks)
        return Match(blocks, max(blocks.values(), default=0))

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _update(self, keys: Sequence[BlockKey], change: Callable[[int], int]) -> None:
        if not keys:
            return
        short = np.unique(short_keys(keys))
        before, which = np.unique(self._table.get(short), return_inverse=True)
        after = np.array([self._number_of(change(self._sets[number])) for number in before], dtype=np.uint32)
        self._table.put(short, after[which])
        if len(self._sets) > SETS_MAX:
            self._forget_unused_sets()

    def _number_of(self, held: int) -> int:
        number = self._number.get(held)
        if number is None:
            number = self._number[held] = len(self._sets)
            self._sets.append(held)
        return number

    def _forget_unused_sets(self) -> None:
        used = self._table.values_in_use(len(self._sets))
        used[NOTHING] = True
        kept = np.flatnonzero(used)
        changed = np.zeros(len(self._sets), dtype=np.uint32)
        changed[kept] = np.arange(len(kept), dtype=np.uint32)
        self._sets = [self._sets[number] for number in kept]
        self._number = {held: number for number, held in enumerate(self._sets)}
        self._table.replace_values(changed)

    def _rename(self, numbers: Sequence[int]) -> None:
        """Set number n is called `numbers[n]` from now on."""
        changed = np.arange(len(self._sets), dtype=np.uint32)  # sets made just now keep theirs
        changed[: len(numbers)] = numbers
        self._table.replace_values(changed)

    def _slot_of(self, node: str) -> int:
        slot = self._slot.get(node)
        if slot is None:
            slot = self._free.pop() if self._free else len(self._slot)
            self._slot[node] = slot
            self._name[slot] = node
            self._alive |= 1 << slot
        return slot

    def _note(self, mask: int, depth: int, blocks: dict[str, int]) -> None:
        while mask:
            lowest = mask & -mask
            blocks[self._name[lowest.bit_length() - 1]] = depth
            mask ^= lowest
