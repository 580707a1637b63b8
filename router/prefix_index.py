"""Which node probably holds which block: longest-prefix lookup over all nodes at once. Deciding code.

Nodes are bits of an integer; a key maps to the set of its holders, and most neighbours in a prompt have the same set. So a
lookup fetches the sets of all keys at once and intersects where they change: 2,000 keys over 1,000 nodes in a tenth of a
millisecond. Like the directory it is a hint: what it does not know costs a prefix that is computed again, what it wrongly
believes costs a miss.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from core.entry_table import NOTHING, Keys, Values
from router.key_runs import KeyRuns

BLOCKS_MAX = 4_000_000
SETS_MAX = 65_536
DEAD_MAX = 32
FEW = 4
"""Bits that are looked for one by one rather than all at once."""

Depths = npt.NDArray[np.float64]
"""Blocks of a prefix by slot of its holder; one more element, which is 0, for whoever has no slot."""


class Slots:
    """Numbers for node names, used again some time after their nodes have gone. Shared by the indexes of all tiers."""

    def __init__(self) -> None:
        self.of: dict[str, int] = {}
        self.names: list[str] = []
        self.alive = 0
        """A bit per node that has not gone."""
        self.dead = 0
        self.version = 0
        """Another one when a name has another number."""
        self._free: list[int] = []

    def take(self, node: str) -> int:
        slot = self.of.get(node)
        if slot is None:
            if self._free:
                slot = self._free.pop()
                self.names[slot] = node
            else:
                slot = len(self.names)
                self.names.append(node)
            self.of[node] = slot
            self.alive |= 1 << slot
            self.version += 1
        return slot

    def drop(self, node: str) -> bool:
        """Nothing that the node held counts from now on. False for unknown nodes."""
        slot = self.of.pop(node, None)
        if slot is None:
            return False
        self.alive &= ~(1 << slot)
        self.dead |= 1 << slot
        self.version += 1
        return True

    def worth_sweeping(self) -> bool:
        """Sweeping looks at every key, so the dead are swept together where there are many nodes."""
        dead = self.dead.bit_count()
        return dead >= DEAD_MAX or 4 * dead >= max(1, len(self.of))

    def swept(self) -> None:
        """No index names dead slots any more."""
        self._free += map(int, _bits(self.dead))
        self.dead = 0


class PrefixIndex:
    """One per tier. `blocks_max` keys at most: beyond them the ones that were learned first are forgotten."""

    def __init__(self, slots: Slots, blocks_max: int = BLOCKS_MAX) -> None:
        self._slots = slots
        self._table = KeyRuns(blocks_max)
        self._sets: list[int] = [0]  # by number; NOTHING is the empty set
        self._number: dict[int, int] = {0: NOTHING}
        self._sets_max = SETS_MAX

    def __len__(self) -> int:
        return len(self._table)

    @property
    def nbytes(self) -> int:
        """Of the table and the sets."""
        each = (max(self._slots.alive.bit_length(), 1) + 29) // 30 * 4 + 24
        return self._table.nbytes + len(self._sets) * (each + 100)

    def added(self, node: str, keys: Keys) -> None:
        bit = 1 << self._slots.take(node)
        self._update(keys, lambda held: held | bit)

    def removed(self, node: str, keys: Keys) -> None:
        slot = self._slots.of.get(node)
        if slot is not None:
            self._update(keys, lambda held: held & ~(1 << slot))

    def sweep(self) -> None:
        """Forgets what dead slots held. Costs time in proportion to the table."""
        kept = ~self._slots.dead
        changed = np.array([self._number_of(held & kept) for held in list(self._sets)], dtype=np.uint32)
        self._table.replace_values(np.concatenate([changed, np.arange(len(changed), len(self._sets), dtype=np.uint32)]))
        self._forget_unused_sets()

    def depths(self, keys: Keys) -> Depths:
        """How far into `keys` the blocks of the node of each slot reach without a gap."""
        slots = self._slots
        depths = np.zeros(len(slots.names) + 1)
        numbers = self._table.leading(keys)
        if not numbers.size:
            return depths
        mask = slots.alive & self._sets[numbers[0]]
        edges = (numbers[1:] != numbers[:-1]).nonzero()[0] + 1
        for depth, number in zip(edges.tolist(), numbers[edges].tolist(), strict=True):
            kept = mask & self._sets[number]
            if kept != mask:
                _reach(depths, mask, depth)
                mask = kept
                if not mask:
                    return depths
        _reach(depths, mask, numbers.size)
        return depths

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _update(self, keys: Keys, change: Callable[[int], int]) -> None:
        if not keys.size:
            return
        places = self._table.find(keys)
        before = self._table.at(places)
        edges = np.flatnonzero(before[1:] != before[:-1]) + 1
        starts = [0, *edges.tolist()]
        known: dict[int, int] = {}
        after = np.array([self._changed(number, change, known) for number in before[starts].tolist()], dtype=np.uint32)
        values: Values = np.repeat(after, np.diff([*starts, keys.size]))
        self._table.put(keys, values, places)
        if len(self._sets) > self._sets_max:
            self._forget_unused_sets()

    def _changed(self, number: int, change: Callable[[int], int], known: dict[int, int]) -> int:
        after = known.get(number)
        if after is None:
            after = known[number] = self._number_of(change(self._sets[number]))
        return after

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
        changed: Values = np.zeros(len(self._sets), dtype=np.uint32)
        changed[kept] = np.arange(len(kept), dtype=np.uint32)
        self._sets = [self._sets[number] for number in kept.tolist()]
        self._number = {held: number for number, held in enumerate(self._sets)}
        self._table.replace_values(changed)
        self._sets_max = max(SETS_MAX, 2 * len(self._sets))


def _reach(depths: Depths, mask: int, depth: int) -> None:
    """All nodes of the mask have so many blocks, at least: mostly they are all, and then few."""
    if mask.bit_count() > FEW:
        depths[_flags(mask, depths.size)] = depth
        return
    while mask:
        slot = mask.bit_length() - 1
        depths[slot] = depth
        mask ^= 1 << slot


def _bits(mask: int) -> npt.NDArray[np.int64]:
    """The places of the ones."""
    return _flags(mask, mask.bit_length()).nonzero()[0]


def _flags(mask: int, count: int) -> npt.NDArray[np.bool_]:
    packed = np.frombuffer(mask.to_bytes((count + 7) // 8, "little"), dtype=np.uint8)
    return np.unpackbits(packed, count=count, bitorder="little").view(np.bool_)
