"""The format of a segment file: one header page, a table of record headers, then the records' bytes. Deciding code.

    offset 0                 header page (4096 bytes): magic, version, segment, slots, layout as JSON, xxh3-64 of all that
    offset 4096              `slots` record headers of 64 bytes: key, length, digest of the bytes, time, number of the tenant,
                             cost of computing it again, xxh3-64 of all that
    offset `data_offset`     `slots` spans of `block_bytes` bytes, the data of slot n at `data_offset + n * block_bytes`

A file grows at its end, slot after slot; a record's header is written after its bytes. The headers stand together, so an
index is rebuilt with one read per file and neighbours' bytes are one span. A record counts when its header's checksum
holds (it is seeded with segment and slot: a header in the wrong place is none) and its bytes lie inside the file; whether
they are whole is checked each time they are read. Numbers are little-endian. Files written before headers told tenant and cost
have zeros there, which say what is true of them: nobody's, cost not known. So they are of the same version.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import NamedTuple

import xxhash

from core.blocks import KEY_BYTES, BlockKey, KvLayout

MAGIC = b"TandemKV"
VERSION = 1
HEADER_BYTES = 4096
SLOT_BYTES = 64
_HEADER = struct.Struct("<8sIIQI")  # magic, version, slots, segment, length of the layout's JSON
_SLOT = struct.Struct("<16sQQdQd")  # key, length, digest, unix time of writing, number of the tenant, cost in seconds
_SUM = struct.Struct("<Q")
EMPTY_SLOT = bytes(SLOT_BYTES)


class SlotHeader(NamedTuple):
    slot: int
    key: BlockKey
    digest: int
    written_s: float
    tenant_number: int = 0
    cost_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Geometry:
    """Where things stand in a segment of `slots` records of `block_bytes` bytes."""

    block_bytes: int
    slots: int

    @property
    def data_offset(self) -> int:
        return -(-(HEADER_BYTES + self.slots * SLOT_BYTES) // HEADER_BYTES) * HEADER_BYTES

    @property
    def segment_bytes(self) -> int:
        return self.bytes_with(self.slots)

    def bytes_with(self, used: int) -> int:
        """Size of a file whose first `used` slots were written."""
        return self.data_offset + used * self.block_bytes

    def slot_offset(self, slot: int) -> int:
        return HEADER_BYTES + slot * SLOT_BYTES

    def data_of(self, slot: int) -> int:
        return self.data_offset + slot * self.block_bytes

    def slots_within(self, file_bytes: int) -> int:
        """How many slots have all their bytes in a file of this size."""
        return max(0, min(self.slots, (file_bytes - self.data_offset) // self.block_bytes))


def geometry_for(block_bytes: int, bytes_max: int, segment_bytes: int) -> Geometry | None:
    """Segments of about `segment_bytes`, smaller when fewer than four would fit; None when two single records do not fit."""
    wanted = min(segment_bytes, bytes_max // 4)
    slots = max(1, (wanted - 2 * HEADER_BYTES) // (block_bytes + SLOT_BYTES))
    geometry = Geometry(block_bytes, slots)
    return geometry if 2 * geometry.segment_bytes <= bytes_max else None


def directory_name(layout: KvLayout) -> str:
    """Names format, fingerprint and layout, so that blocks which must not meet never share a directory."""
    return f"{layout.fingerprint.hex() or 'none'}-{sha256(_layout_json(layout)).hexdigest()[:8]}-v{VERSION}"


def pack_header(segment: int, geometry: Geometry, layout: KvLayout) -> bytes:
    described = _layout_json(layout)
    head = _HEADER.pack(MAGIC, VERSION, geometry.slots, segment, len(described)) + described
    assert len(head) <= HEADER_BYTES - _SUM.size, "a layout's description fits the header page"
    body = head.ljust(HEADER_BYTES - _SUM.size, b"\0")
    return body + _SUM.pack(xxhash.xxh3_64_intdigest(body))


def read_header(page: bytes, segment: int, layout: KvLayout) -> Geometry | None:
    """The geometry of a segment file of ours; None for anything else, a torn or damaged page included."""
    if len(page) < HEADER_BYTES:
        return None
    body, (checksum,) = page[: HEADER_BYTES - _SUM.size], _SUM.unpack_from(page, HEADER_BYTES - _SUM.size)
    if xxhash.xxh3_64_intdigest(body) != checksum:
        return None
    magic, version, slots, number, described = _HEADER.unpack_from(body)
    same_layout = body[_HEADER.size : _HEADER.size + described] == _layout_json(layout)
    if magic != MAGIC or version != VERSION or number != segment or slots < 1 or not same_layout:
        return None
    return Geometry(layout.block_bytes, slots)


def pack_slot(segment: int, header: SlotHeader, length: int) -> bytes:
    assert len(header.key) == KEY_BYTES, "only full blocks have keys"
    body = _SLOT.pack(header.key, length, header.digest, header.written_s, header.tenant_number, header.cost_s)
    return body + _SUM.pack(_slot_sum(body, segment, header.slot))


def read_slots(table: bytes, segment: int, block_bytes: int) -> Iterator[SlotHeader]:
    """The records whose headers hold, of a table that begins with slot 0. Evicted and torn ones are passed over."""
    for slot in range(len(table) // SLOT_BYTES):
        entry = table[slot * SLOT_BYTES : (slot + 1) * SLOT_BYTES]
        if entry == EMPTY_SLOT:
            continue
        body, (checksum,) = entry[: _SLOT.size], _SUM.unpack_from(entry, _SLOT.size)
        key, length, digest, written_s, tenant_number, cost_s = _SLOT.unpack(body)
        if checksum == _slot_sum(body, segment, slot) and length == block_bytes:
            yield SlotHeader(slot, key, digest, written_s, tenant_number, cost_s)


def _slot_sum(body: bytes, segment: int, slot: int) -> int:
    return xxhash.xxh3_64_intdigest(body, seed=(segment << 32 | slot) & 0xFFFFFFFFFFFFFFFF)


def _layout_json(layout: KvLayout) -> bytes:
    names = ("dtype", "num_layers", "kv_heads", "head_dim", "block_size")
    facts = {"fingerprint": layout.fingerprint.hex(), **{name: getattr(layout, name) for name in names}}
    return json.dumps(facts, sort_keys=True).encode()
