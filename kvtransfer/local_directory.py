"""The directory in memory: plain dictionaries, made for ten million entries. Deciding code; time comes as an argument.

An entry is a key's first 64 bits (a collision is a stale hint, no more) and the tuple of its holders, shared by all entries
with the same holders. The table is split in parts, so that none is ever resized or swept for long; more of them would tear
keys that were announced together, and are looked up together, further apart in memory. What dead nodes held is not found any
more at once, and swept out part by part by later joins and announcements, never by a lookup.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from core.blocks import KEY_BYTES, BlockKey
from core.clock import Clock
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

ENTRIES_MAX = 32_000_000
NODES_MAX = 10_000
SWEEP_ENTRIES = 16_384
"""Looked at by one join or announcement while there is something to sweep; a part is always swept whole."""
LOOKUP_KEYS = 512
"""Looked up at once, so that a miss near the beginning costs little."""
_PART_BITS = 6
_PARTS = 1 << _PART_BITS
_SHARED_SETS_MAX = 65_536

_Words = tuple[int, ...]  # node number * 2 + tier, in the order in which they were announced


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
        self._parts: list[dict[int, _Words]] = [{} for _ in range(_PARTS)]
        self._get = [part.get for part in self._parts]
        self._nodes: dict[str, _Node] = {}
        self._numbers: dict[int, _Node] = {}
        self._last_number = 0
        self._expires_at = float("inf")  # no node's time ends before
        self._shared: dict[_Words, _Words] = {}
        self._holders: dict[_Words, tuple[Holder, ...]] = {}  # of those looked up since nodes last changed
        self._to_sweep: dict[int, int] = {}  # dead node number -> parts not yet swept of it
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
        for words, count in self._find(keys[: LOCATE_KEYS_MAX * KEY_BYTES]):
            alive = self._alive(words)
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
        assert self.counts.entries == sum(map(len, self._parts)) <= self.entries_max, "entries are miscounted"
        assert {node.number: node for node in self._nodes.values()} == self._numbers, "a node has two numbers, or none"
        known = self._numbers.keys() | self._to_sweep.keys()
        for part in self._parts:
            for words in part.values():
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
        self._to_sweep[node.number] = _PARTS
        self._holders.clear()

    def _expire(self, now: float) -> None:
        if now < self._expires_at:
            return
        for node in [node for node in self._nodes.values() if node.until <= now]:
            self._bury(node)
        self._expires_at = min((node.until for node in self._nodes.values()), default=float("inf"))

    def _alive(self, words: _Words) -> tuple[Holder, ...]:
        found = self._holders.get(words)
        if found is None:
            if len(self._holders) >= _SHARED_SETS_MAX:
                self._holders.clear()
            living = [(self._numbers[word >> 1].record.source, word & 1) for word in words if word >> 1 in self._numbers]
            found = tuple(Holder(source.worker_id, source.epoch, Tier(tier)) for source, tier in living)
            self._holders[words] = found
        return found

    # ---- entries -----------------------------------------------------------------------------------------------------

    def _find(self, keys: bytes) -> Iterator[tuple[_Words, int]]:
        """Entries of the longest prefix that has some, each with how many keys in a row have it."""
        for start in range(0, len(keys), LOOKUP_KEYS * KEY_BYTES):
            places, shorts = _short(keys[start : start + LOOKUP_KEYS * KEY_BYTES])
            get = self._get
            found = [get[place](short) for place, short in zip(places, shorts, strict=True)]
            current, count = found[0], 0
            if current is None:
                return
            for words in found:
                if words is current:
                    count += 1
                    continue
                yield current, count
                if words is None:
                    return
                current, count = words, 1
            yield current, count

    def _add(self, keys: bytes, word: int) -> None:
        alone = self._share((word,))
        for place, short in zip(*_short(keys), strict=True):
            part = self._parts[place]
            words = part.get(short)
            if words is None:
                if self.counts.entries >= self.entries_max:
                    self.counts.refused += 1
                    continue
                self.counts.entries += 1
                part[short] = alone
            elif word not in words:
                part[short] = self._share((*words, word))

    def _remove(self, keys: bytes, word: int) -> None:
        for place, short in zip(*_short(keys), strict=True):
            part = self._parts[place]
            words = part.get(short)
            if words is not None and word in words:
                self._put(part, short, tuple(other for other in words if other != word))

    def _put(self, part: dict[int, _Words], key: int, words: _Words) -> None:
        if words:
            part[key] = self._share(words)
        else:
            del part[key]
            self.counts.entries -= 1

    def _share(self, words: _Words) -> _Words:
        """The same object for the same holders, within a bound on how many sets are remembered."""
        shared = self._shared.get(words)
        if shared is None:
            if len(self._shared) >= _SHARED_SETS_MAX:
                self._shared.clear()
            shared = self._shared[words] = words
        return shared

    def _sweep(self) -> None:
        budget = SWEEP_ENTRIES
        while self._to_sweep and budget > 0:
            part = self._parts[self._next_part]
            self._next_part = (self._next_part + 1) % _PARTS
            budget -= max(len(part), SWEEP_ENTRIES // _PARTS)
            dead = self._to_sweep
            stale_sets = {words for words in set(part.values()) if any(word >> 1 in dead for word in words)}
            stale = [(key, words) for key, words in part.items() if words in stale_sets] if stale_sets else []
            for key, words in stale:
                self._put(part, key, tuple(word for word in words if word >> 1 not in dead))
            self.counts.swept += len(stale)
            for number in list(dead):
                dead[number] -= 1
                if not dead[number]:
                    del dead[number]
            if not dead:
                self._shared.clear()  # sets that named them; entries keep theirs


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


def _short(keys: bytes) -> tuple[list[int], list[int]]:
    """Of each key its part and, from the same first 64 bits, its name there: 58 bits, the most that fit a 32-byte integer."""
    first = np.frombuffer(keys, "<u8")[::2]
    return (first & np.uint64(_PARTS - 1)).tolist(), (first >> np.uint64(_PART_BITS)).tolist()
