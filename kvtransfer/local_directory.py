"""The directory in memory, made for ten million entries and prompts of thousands of keys. Deciding code; time is an argument.

An entry is a key's first 64 bits (a collision is a stale hint, no more) and the number of the set of its holders, which all
entries with the same holders share. What dead nodes held is not found any more at once, and swept out part by part by later
joins and announcements, never by a lookup.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from core.blocks import KEY_BYTES, BlockKey
from core.clock import Clock
from core.entry_table import NOTHING, EntryTable, Keys, Values, distinct, short_keys
from core.errors import StaleEpochError
from kvtransfer.directory import (
    LOCATE_KEYS_MAX,
    Delta,
    DirectoryError,
    DuplicateNodeError,
    Holder,
    Located,
    NodeRecord,
    Runs,
    Tier,
    pack,
    pack_deltas,
)
from kvtransfer.holder_sets import HolderSets, Words

ENTRIES_MAX = 32_000_000
NODES_MAX = 10_000
LOOKUP_KEYS = 2048
"""Looked up at once, in about a quarter of a millisecond; the next ones only if all of these are held."""
SWEEP_CALLS = 64
"""Joins and announcements after which all of the table is swept, if it has more parts than that; else one part each."""
_HOLDERS_MAX = 65_536


@dataclass(slots=True)
class _Node:
    number: int
    record: NodeRecord
    until: float


@dataclass(slots=True)
class DirectoryCounts:
    entries: int = 0
    refused: int = 0
    """Announced keys for which there was no room."""
    swept: int = 0
    """Of dead nodes."""


@dataclass
class LocalDirectory:
    """Not thread-safe. `now` never goes back; a caller's clock that jumps costs a node its entries until it joins again."""

    entries_max: int = ENTRIES_MAX
    counts: DirectoryCounts = field(default_factory=DirectoryCounts)

    def __post_init__(self) -> None:
        self._table = EntryTable(self.entries_max)
        self._sets = HolderSets()
        self._nodes: dict[str, _Node] = {}
        self._numbers: dict[int, _Node] = {}
        self._last_number = 0
        self._expires_at = float("inf")  # no node's time ends before
        self._holders: dict[Words, tuple[Holder, ...]] = {}  # of sets looked up since nodes last changed
        self._to_sweep: dict[int, int] = {}  # dead node number -> parts of the table not yet swept of it
        self._next_part = 0

    def join(self, record: NodeRecord, ttl_s: float, now: float) -> bool:
        """As Directory.join; raises DirectoryError as well when NODES_MAX other nodes are alive."""
        self._expire(now)
        worker_id, epoch = record.source.worker_id, record.source.epoch
        node = self._nodes.get(worker_id)
        if node is not None:
            _refuse_rivals(node.record, record)
            if node.record.source.epoch < epoch:
                self._bury(node)
                node = None
        known = node is not None
        if node is None:
            node = self._number(record)
        elif node.record != record:
            node.record = record
            self._holders.clear()
        node.until = now + ttl_s
        self._expires_at = min(self._expires_at, node.until)
        self._sweep()
        return known

    def leave(self, worker_id: str, epoch: int, now: float) -> None:
        self._expire(now)
        node = self._nodes.get(worker_id)
        if node is not None and node.record.source.epoch == epoch:
            self._bury(node)
        self._sweep()

    def announce(self, worker_id: str, epoch: int, delta: Delta, now: float) -> bool:
        self._expire(now)
        node = self._nodes.get(worker_id)
        if node is None or node.record.source.epoch != epoch:
            return False
        self._remove(delta.removed_dram, 2 * node.number + Tier.DRAM)
        self._remove(delta.removed_disk, 2 * node.number + Tier.DISK)
        self._add(delta.added_dram, 2 * node.number + Tier.DRAM)
        self._add(delta.added_disk, 2 * node.number + Tier.DISK)
        self._sweep()
        return True

    def locate(self, keys: bytes, now: float) -> Runs:
        """`keys`: 16 bytes each, one after another."""
        self._expire(now)
        runs: list[tuple[int, tuple[Holder, ...]]] = []
        for number, count in self._find(keys[: LOCATE_KEYS_MAX * KEY_BYTES]):
            alive = self._alive(number)
            if not alive:
                break
            if runs and runs[-1][1] == alive:
                runs[-1] = (runs[-1][0] + count, alive)
            else:
                runs.append((count, alive))
        named = {holder.worker_id: None for _, holders in runs for holder in holders}
        return Runs([self._nodes[worker_id].record for worker_id in named], runs)

    def nodes(self, now: float) -> list[NodeRecord]:
        self._expire(now)
        return [self._nodes[worker_id].record for worker_id in sorted(self._nodes)]

    def check(self) -> None:
        """Asserts that the tables agree."""
        numbers = self._table.values()
        assert self.counts.entries == len(self._table) == len(numbers) <= self.entries_max, "entries are miscounted"
        assert {node.number: node for node in self._nodes.values()} == self._numbers, "a node has two numbers, or none"
        self._sets.check(numbers)
        known = self._numbers.keys() | self._to_sweep.keys()
        for number in set(numbers.tolist()):
            words = self._sets.words(number)
            assert words, "an entry that nobody holds"
            assert {word >> 1 for word in words} <= known, "an entry of a node that was swept out"

    # ---- nodes -------------------------------------------------------------------------------------------------------

    def _number(self, record: NodeRecord) -> _Node:
        if len(self._nodes) >= NODES_MAX:
            raise DirectoryError(f"{NODES_MAX} nodes have joined; no more of them are taken")
        self._last_number += 1
        node = _Node(self._last_number, record, 0.0)
        self._nodes[record.source.worker_id] = self._numbers[node.number] = node
        return node

    def _bury(self, node: _Node) -> None:
        del self._nodes[node.record.source.worker_id], self._numbers[node.number]
        self._to_sweep[node.number] = self._table.parts
        self._holders.clear()

    def _expire(self, now: float) -> None:
        if now < self._expires_at:
            return
        for node in [node for node in self._nodes.values() if node.until <= now]:
            self._bury(node)
        self._expires_at = min((node.until for node in self._nodes.values()), default=float("inf"))

    def _alive(self, number: int) -> tuple[Holder, ...]:
        words = self._sets.words(number)
        found = self._holders.get(words)
        if found is None:
            if len(self._holders) >= _HOLDERS_MAX:
                self._holders.clear()
            living = [(self._numbers[word >> 1].record.source, word & 1) for word in words if word >> 1 in self._numbers]
            found = tuple(Holder(source.worker_id, source.epoch, Tier(tier)) for source, tier in living)
            self._holders[words] = found
        return found

    # ---- entries -----------------------------------------------------------------------------------------------------

    def _find(self, keys: bytes) -> Iterator[tuple[int, int]]:
        """Sets of the longest prefix that has entries, each with how many keys in a row have it."""
        names = short_keys(keys, KEY_BYTES)
        for start in range(0, names.size, LOOKUP_KEYS):
            numbers = self._table.get(names[start : start + LOOKUP_KEYS])
            last = 0
            for edge in [*(np.flatnonzero(numbers[1:] != numbers[:-1]) + 1).tolist(), numbers.size]:
                if numbers[last] == NOTHING:
                    return
                yield int(numbers[last]), edge - last
                last = edge

    def _add(self, keys: bytes, word: int) -> None:
        if not keys:
            return
        names = distinct(short_keys(keys, KEY_BYTES))
        self._table.grow(names.size, self._living)

        def added(names: Keys, numbers: Values) -> Values:
            taken = self._admitted(keys, names, numbers)
            new = np.zeros_like(numbers)
            new[taken] = self._sets.changed(numbers[taken], lambda words: words if word in words else (*words, word))
            return new

        refused = self._table.change(names, added)
        self.counts.refused += refused

    def _admitted(self, keys: bytes, names: Keys, numbers: Values) -> npt.NDArray[np.bool_]:
        """Which of `names` there is room for; of new ones those that stand first in `keys`."""
        admitted = np.ones(names.size, np.bool_)
        new = np.flatnonzero(numbers == NOTHING)
        too_many = int(new.size) - (self.entries_max - len(self._table))
        if too_many > 0:
            self.counts.refused += too_many
            in_order, first = np.unique(short_keys(keys, KEY_BYTES), return_index=True)
            first = first[np.searchsorted(in_order, names)]
            admitted[new[np.argsort(first[new])[-too_many:]]] = False
        return admitted

    def _remove(self, keys: bytes, word: int) -> None:
        if not keys:
            return
        names = distinct(short_keys(keys, KEY_BYTES))

        def removed(_: Keys, numbers: Values) -> Values:
            return self._sets.changed(numbers, lambda words: tuple(other for other in words if other != word))

        self._table.change(names, removed)

    def _sweep(self) -> None:
        for _ in range(max(1, self._table.parts // SWEEP_CALLS)):
            if not self._to_sweep:
                break
            self._next_part = (self._next_part + 1) % self._table.parts
            self._table.recast(self._next_part, self._living)
            self._to_sweep = {number: left - 1 for number, left in self._to_sweep.items() if left > 1}
        self.counts.entries = len(self._table)

    def _living(self, numbers: Values) -> Values:
        """Sets without the nodes that died."""
        new = self._sets.changed(numbers, lambda words: tuple(word for word in words if word >> 1 in self._numbers))
        self.counts.swept += int(np.count_nonzero(new != numbers))
        return new


class ClockedDirectory:
    """A LocalDirectory as a Directory of this process: never away, never late."""

    def __init__(self, table: LocalDirectory, clock: Clock) -> None:
        self._table = table
        self._clock = clock
        self._closed = False

    async def join(self, record: NodeRecord, ttl_s: float) -> bool:
        return self._open().join(record, ttl_s, self._clock.now())

    async def leave(self, worker_id: str, epoch: int) -> None:
        self._open().leave(worker_id, epoch, self._clock.now())

    async def announce(
        self, worker_id: str, epoch: int, added: Sequence[tuple[BlockKey, Tier]], removed: Sequence[tuple[BlockKey, Tier]]
    ) -> bool:
        table, now = self._open(), self._clock.now()
        return all(table.announce(worker_id, epoch, delta, now) for delta in pack_deltas(added, removed))

    async def locate(self, keys: Sequence[BlockKey]) -> Located:
        return self._open().locate(pack(keys), self._clock.now()).expand()

    async def nodes(self) -> list[NodeRecord]:
        return self._open().nodes(self._clock.now())

    async def close(self) -> None:
        self._closed = True

    def _open(self) -> LocalDirectory:
        if self._closed:
            raise DirectoryError("this directory was closed")
        return self._table


def _refuse_rivals(known: NodeRecord, new: NodeRecord) -> None:
    old, source = known.source, new.source
    if source.epoch < old.epoch:
        raise StaleEpochError(f"{source.worker_id} epoch {source.epoch} was superseded by epoch {old.epoch}")
    if source.epoch == old.epoch and source.grpc_address != old.grpc_address:
        raise DuplicateNodeError(
            f"{source.worker_id} epoch {source.epoch} is at {old.grpc_address}; {source.grpc_address} is refused. "
            "Give each node an id of its own"
        )
