"""The format of a segment, and which segment goes when room is short."""

from __future__ import annotations

from dataclasses import replace

import pytest

from core.blocks import KvLayout
from kvtransfer.disk_index import DiskIndex, Record
from kvtransfer.segments import (
    HEADER_BYTES,
    SLOT_BYTES,
    Geometry,
    SlotHeader,
    directory_name,
    geometry_for,
    pack_header,
    pack_slot,
    read_header,
    read_slots,
)

LAYOUT = KvLayout(b"\x01" * 16, "float32", 6, 2, 64, 16)
KEYS = [n.to_bytes(16, "big") for n in range(8)]
GEOMETRY = Geometry(100, 4)


def test_places_do_not_overlap_and_data_begins_on_a_page():
    geometry = Geometry(LAYOUT.block_bytes, 100)
    assert geometry.slot_offset(0) == HEADER_BYTES
    assert geometry.slot_offset(100) <= geometry.data_offset == 3 * 4096
    assert geometry.segment_bytes == geometry.data_of(100)


@pytest.mark.parametrize(("size", "slots"), [(0, 0), (8191, 0), (8192, 0), (8291, 0), (8292, 1), (8592, 4), (99999, 4)])
def test_slots_within_a_file(size, slots):
    assert GEOMETRY.slots_within(size) == slots


@pytest.mark.parametrize("bytes_max", [2**18, 2**20, 10**9, 10**12])
def test_at_least_two_segments_fit_whatever_the_bound(bytes_max):
    geometry = geometry_for(LAYOUT.block_bytes, bytes_max, 64 * 2**20)
    assert geometry is not None
    assert 2 * geometry.segment_bytes <= bytes_max
    assert geometry.segment_bytes <= 64 * 2**20


def test_a_bound_below_two_records_has_no_geometry():
    assert geometry_for(LAYOUT.block_bytes, 2 * LAYOUT.block_bytes, 2**20) is None


def test_a_header_is_read_back_by_its_own_segment_and_layout_only():
    geometry = Geometry(LAYOUT.block_bytes, 9)
    page = pack_header(7, geometry, LAYOUT)
    assert len(page) == HEADER_BYTES
    assert read_header(page, 7, LAYOUT) == geometry
    assert read_header(page, 8, LAYOUT) is None
    assert read_header(page[:-1], 7, LAYOUT) is None
    assert read_header(bytes(HEADER_BYTES), 7, LAYOUT) is None
    assert read_header(page, 7, replace(LAYOUT, head_dim=32)) is None


def test_slots_are_read_back_and_what_is_torn_or_misplaced_is_passed_over():
    slots = [pack_slot(3, SlotHeader(n, KEYS[n], n + 1, 5.0), 100) for n in range(4)]
    torn = slots[1][:20] + bytes(SLOT_BYTES - 20)
    table = slots[0] + torn + bytes(SLOT_BYTES) + slots[3]
    assert list(read_slots(table, 3, 100)) == [SlotHeader(0, KEYS[0], 1, 5.0), SlotHeader(3, KEYS[3], 4, 5.0)]
    assert list(read_slots(table, 4, 100)) == [], "of another segment"
    assert list(read_slots(table, 3, 99)) == [], "of another size"
    assert list(read_slots(slots[1] + slots[0], 3, 100)) == [], "in each other's place"


def test_what_must_not_meet_has_directories_of_its_own():
    others = [replace(LAYOUT, fingerprint=b"\x02" * 16), replace(LAYOUT, block_size=32), replace(LAYOUT, dtype="bfloat16")]
    names = {directory_name(layout) for layout in (LAYOUT, *others)}
    assert len(names) == 4
    assert directory_name(LAYOUT).startswith(LAYOUT.fingerprint.hex())


def filled(bytes_max: int = 3 * GEOMETRY.segment_bytes) -> DiskIndex:
    index = DiskIndex(bytes_max)
    for segment in (1, 2):
        index.add_segment(segment, GEOMETRY, 3)
        for slot in range(3):
            index.add(KEYS[(segment - 1) * 3 + slot], Record(segment, slot, 9, 0.0))
    return index


def test_the_oldest_segment_goes_when_there_is_no_room():
    index = filled()
    room = 3 * GEOMETRY.segment_bytes - index.bytes
    assert index.victim(room) is None
    assert index.victim(room + 1) == 1
    assert [record.slot for record in index.drop_segment(1)] == [0, 1, 2]
    assert list(index) == KEYS[3:6]
    index.check()


def test_what_was_read_is_worth_keeping_the_latest_read_first():
    index = filled()
    for n in (0, 2, 1, 0, 4):
        index.use(KEYS[n])
    assert index.worth_keeping(1, 8) == [KEYS[0], KEYS[1], KEYS[2]]
    assert index.worth_keeping(1, 2) == [KEYS[0], KEYS[1]]
    assert index.worth_keeping(2, 8) == [KEYS[4]]
    index.drop(KEYS[0])
    assert index.worth_keeping(1, 8) == [KEYS[1], KEYS[2]]


def test_while_a_tenant_is_over_its_share_the_others_keep_theirs_first_read_or_not():
    index = DiskIndex(4 * GEOMETRY.segment_bytes, tenant_blocks_max=3)
    index.add_segment(1, Geometry(100, 5), 5)
    owners = [b"loud", b"quiet", b"loud", b"quiet", b""]
    for slot, tenant in enumerate(owners):
        index.add(KEYS[slot], Record(1, slot, 9, 0.0, tenant))
    for slot in (1, 0):
        index.use(KEYS[slot])
    assert index.over_share() == set()
    assert index.worth_keeping(1, 8) == [KEYS[0], KEYS[1]], "nobody is over: what was read"
    index.add_segment(2, GEOMETRY, 2)
    for slot in range(2):
        index.add(KEYS[5 + slot], Record(2, slot, 9, 0.0, b"loud"))
    assert index.over_share() == {b"loud"}
    assert index.worth_keeping(1, 8) == [KEYS[1], KEYS[4], KEYS[3], KEYS[0]], "not what the loud one never read"
    assert index.worth_keeping(1, 2) == [KEYS[1], KEYS[4]]
    index.check()
    index.drop_segment(2)
    assert index.over_share() == set()
    index.drop(KEYS[0])
    index.check()


def test_a_key_is_at_one_place_and_dropped_only_where_it_is_thought_to_be():
    index = filled()
    old = index.find(KEYS[0])
    index.extend(2, 4)
    index.add(KEYS[0], Record(2, 3, 9, 1.0))
    assert index.drop(KEYS[0], only=old) is None
    assert index.find(KEYS[0]) == Record(2, 3, 9, 1.0)
    index.check()
    assert index.drop(KEYS[0]) == Record(2, 3, 9, 1.0)
    assert KEYS[0] not in index
    index.check()
