"""What is on disk and where, which segment goes first and what of it is worth keeping. Deciding code.

Segments are dropped in the order they were written. Before one goes, records that were read since they were written there
get a second chance: they are copied into the segment being written, which makes them unread again. So use is judged block
by block (a segment kept for one hot block would keep all its cold ones), as CLOCK does, and files are only ever appended to.

Shares of tenants are soft, as in memory: while some tenant has more than its share, records of the others get that second
chance before it, read or not, so that what goes is its own. At most half a segment is copied, so a tenant whose blocks fill
whole segments may lose some of them all the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from core.blocks import BlockKey
from kvtransfer.segments import Geometry

Tenant = bytes


class Record(NamedTuple):
    """Where a block's bytes are, what their digest must be, whose it is and what computing it again takes (0: not known).

    Never changed, so a stale one cannot name other bytes. `written_s` is unix time.
    """

    segment: int
    slot: int
    digest: int
    written_s: float
    tenant: Tenant = b""
    cost_s: float = 0.0


@dataclass(slots=True)
class _Segment:
    geometry: Geometry
    used: int  # slots written, evicted ones included
    keys: dict[int, BlockKey] = field(default_factory=dict)  # by slot
    read: dict[int, None] = field(default_factory=dict)  # slots, the latest read last


class DiskIndex:
    """Not thread-safe: its owner has a lock."""

    def __init__(self, bytes_max: int, tenant_blocks_max: int | None = None) -> None:
        """`tenant_blocks_max`: a tenant's share; None for no shares."""
        self._bytes_max = bytes_max
        self._tenant_blocks_max = tenant_blocks_max
        self._charged: Counter[Tenant] = Counter()
        self._records: dict[BlockKey, Record] = {}
        self._segments: dict[int, _Segment] = {}  # oldest first

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._records

    def __iter__(self) -> Iterator[BlockKey]:
        return iter(self._records)

    @property
    def bytes(self) -> int:
        """On disk, headers and what was evicted inside kept segments included."""
        return sum(s.geometry.bytes_with(s.used) for s in self._segments.values())

    @property
    def segments(self) -> list[int]:
        return list(self._segments)

    def find(self, key: BlockKey) -> Record | None:
        return self._records.get(key)

    def items(self) -> list[tuple[BlockKey, Record]]:
        return list(self._records.items())

    def tenants(self) -> set[Tenant]:
        return {record.tenant for record in self._records.values()}

    def use(self, key: BlockKey) -> Record | None:
        """Like `find`, for a read: what is read stays longer."""
        record = self._records.get(key)
        if record is not None:
            read = self._segments[record.segment].read
            read.pop(record.slot, None)
            read[record.slot] = None
        return record

    def add_segment(self, segment: int, geometry: Geometry, used: int = 0) -> None:
        assert segment not in self._segments, f"segment {segment} is there already"
        self._segments[segment] = _Segment(geometry, used)

    def extend(self, segment: int, used: int) -> None:
        """The segment's file has grown to `used` slots."""
        assert self._segments[segment].used <= used <= self._segments[segment].geometry.slots, "a file grows at its end"
        self._segments[segment].used = used

    def add(self, key: BlockKey, record: Record) -> None:
        """Makes a record of a slot in use findable. A key that was elsewhere is from now on here."""
        self.drop(key)
        self._segments[record.segment].keys[record.slot] = key
        self._records[key] = record
        self._charged[record.tenant] += 1

    def drop(self, key: BlockKey, only: Record | None = None) -> Record | None:
        """Forgets a key (when it still is at `only`, if given) and says where it was."""
        record = self._records.get(key)
        if record is None or (only is not None and record != only):
            return None
        del self._records[key]
        self._discharge(record)
        segment = self._segments[record.segment]
        del segment.keys[record.slot]
        segment.read.pop(record.slot, None)
        return record

    def victim(self, room_bytes: int) -> int | None:
        """The segment to drop so that `room_bytes` more may be written; None when there is room."""
        if self.bytes + room_bytes <= self._bytes_max:
            return None
        return next(iter(self._segments), None)

    def worth_keeping(self, segment: int, count_max: int) -> list[BlockKey]:
        """Keys of a segment that were read since they were written there, the latest read first; see above for shares."""
        found = self._segments[segment]
        slots = list(reversed(found.read))
        if over := self.over_share():
            unread = [slot for slot in sorted(found.keys, reverse=True) if slot not in found.read]
            theirs = {slot for slot, key in found.keys.items() if self._records[key].tenant in over}
            slots = [slot for slot in slots + unread if slot not in theirs] + [slot for slot in slots if slot in theirs]
        return [found.keys[slot] for slot in slots[:count_max]]

    def over_share(self) -> set[Tenant]:
        """Tenants with more blocks here than their share."""
        most = self._tenant_blocks_max
        return set() if most is None else {tenant for tenant, count in self._charged.items() if count > most}

    def keys_of(self, segment: int) -> list[BlockKey]:
        """By slot."""
        found = self._segments[segment]
        return [found.keys[slot] for slot in sorted(found.keys)]

    def drop_segment(self, segment: int) -> list[Record]:
        """Forgets a segment and all that is in it; returns what was."""
        gone = self._segments.pop(segment)
        records = [self._records.pop(key) for key in gone.keys.values()]
        for record in records:
            self._discharge(record)
        return records

    def _discharge(self, record: Record) -> None:
        self._charged[record.tenant] -= 1
        if not self._charged[record.tenant]:
            del self._charged[record.tenant]

    def check(self) -> None:
        """Asserts that records and segments agree."""
        listed = {(s, slot): key for s, segment in self._segments.items() for slot, key in segment.keys.items()}
        assert listed == {(r.segment, r.slot): key for key, r in self._records.items()}, "records and segments disagree"
        assert self._charged == Counter(r.tenant for r in self._records.values()), "tenants are charged for what is not here"
        for segment in self._segments.values():
            assert segment.read.keys() <= segment.keys.keys(), "a record that is gone was read"
            assert all(slot < segment.used <= segment.geometry.slots for slot in segment.keys), "a record behind the end"
