"""What happens between two checks of a generation word, and to threads nobody waits for any more."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.blocks import BlockRecord
from core.errors import DigestMismatchError, TransferError
from kvtransfer.arena import HostArena
from kvtransfer.codec import digest_of
from kvtransfer.copier import INLINE_BYTES_MAX, Copier, CopyJob, Memory
from kvtransfer.raw_chunk import data_of
from kvtransfer.reading import Asked, read_spans
from kvtransfer.transport import BlocksGoneError


@pytest.fixture
def arena():
    arena = HostArena(8, 600_000)
    arena.bytes_view()[:] = np.random.default_rng(3).integers(0, 256, arena.bytes_view().shape, np.uint8)
    return arena


def offer(arena, blocks):
    return [
        BlockRecord(i, b"", b, int(arena.generations[b]), digest_of(arena.bytes_view()[b]), 1) for i, b in enumerate(blocks)
    ]


def job(arena, records, *, digest=True):
    dest = np.zeros_like(arena.bytes_view())
    return CopyJob(Memory(arena.bytes_view(), arena.generations), dest, records, range(len(records)), digest)


class Middle:
    """A `stop` that never stops and does something before the n-th span."""

    def __init__(self, n, act):
        self.left, self.act = n, act

    def __call__(self):
        if self.left == 0:
            self.act()
        self.left -= 1
        return False


@pytest.mark.parametrize("digest", [True, False])
@pytest.mark.parametrize("when", [0, 1, 3])
@pytest.mark.parametrize("block", [1, 5])
def test_a_generation_that_changes_in_the_middle_is_noticed(arena, digest, when, block):
    records = offer(arena, [1, 3, 5, 7])

    def reuse():
        arena.generations[block] += np.uint64(1)
        arena.bytes_view()[block] = 0

    with pytest.raises(BlocksGoneError) as caught:
        job(arena, records, digest=digest).run(Middle(when, reuse))
    assert caught.value.indices == ([1, 3, 5, 7].index(block),)


def test_a_block_overwritten_by_its_owner_is_a_broken_digest(arena):
    records = offer(arena, [1, 3])

    def scribble():
        arena.bytes_view()[3, 9] ^= 1

    with pytest.raises(DigestMismatchError, match="block 1 "):
        job(arena, records).run(Middle(1, scribble))


def test_a_copy_told_to_stop_stops_at_a_span(arena):
    copying = job(arena, offer(arena, [1, 3, 5]))
    copying.run(lambda: True)
    assert not copying.dest.any()


def asked(records):
    columns = ("index", "block_id", "generation", "digest")
    return Asked(*([getattr(record, column) for record in records] for column in columns))


@pytest.mark.parametrize("chunk_bytes", [1000, 600_000, 1_000_000, 2_400_000, 10**8])
def test_reading_in_chunks_gives_every_byte_in_order(arena, chunk_bytes):
    records = offer(arena, [5, 1, 2, 7])
    chunks = [bytes(data_of(message)) for message in read_spans(arena, asked(records), chunk_bytes)]
    assert b"".join(chunks) == arena.bytes_view()[[5, 1, 2, 7]].tobytes()
    assert all(len(chunk) == chunk_bytes for chunk in chunks[:-1])
    assert list(read_spans(arena, asked([]), chunk_bytes)) == []


def test_a_chunk_of_blocks_that_changed_is_not_handed_out(arena):
    reading = read_spans(arena, asked(offer(arena, [5, 1, 2])), 700_000)
    next(reading)
    arena.generations[1] += np.uint64(1)
    with pytest.raises(BlocksGoneError) as caught:
        next(reading)
    assert caught.value.indices == (1,)


def copier(arena, **options):
    return Copier(np.zeros_like(arena.bytes_view()), **{"digest": True, "timeout_s": 5.0, **options})


async def test_a_cancelled_wait_ends_only_when_the_thread_has(arena):
    c = copier(arena)
    entered, ended = threading.Event(), threading.Event()

    def work(stop):
        entered.set()
        while not stop():
            pass
        ended.set()

    task = asyncio.create_task(c.in_thread(work))
    await asyncio.to_thread(entered.wait, 5)
    task.cancel()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()
    c.close()


async def test_what_a_thread_raises_reaches_the_caller(arena):
    c = copier(arena)
    with pytest.raises(ZeroDivisionError):
        await c.in_thread(lambda stop: 1 // 0)
    c.close()


async def test_a_closed_copier_refuses_large_copies(arena):
    c = copier(arena)
    c.close()
    count = INLINE_BYTES_MAX // arena.block_bytes + 1
    with pytest.raises(TransferError, match="closed"):
        await c.copy(Memory(arena.bytes_view(), arena.generations), offer(arena, list(range(count))), list(range(count)))


@pytest.fixture
def two_threads(monkeypatch):
    monkeypatch.setattr("kvtransfer.copier.SHARE_BYTES_MIN", 2**20)


async def test_a_large_copy_by_two_threads_is_whole(arena, two_threads):
    c = copier(arena)
    await c.copy(Memory(arena.bytes_view(), arena.generations), offer(arena, [6, 1, 2, 3, 0]), [0, 5, 6, 7, 2])
    assert (c._dest[[0, 5, 6, 7, 2]] == arena.bytes_view()[[6, 1, 2, 3, 0]]).all()
    assert not c._dest[[1, 3, 4]].any()
    c.close()


async def test_blocks_that_both_threads_miss_are_all_named(arena, two_threads):
    c = copier(arena)
    records = offer(arena, list(range(8)))
    arena.generations[[1, 6]] += np.uint64(1)
    with pytest.raises(BlocksGoneError) as caught:
        await c.copy(Memory(arena.bytes_view(), arena.generations), records, list(range(8)))
    assert set(caught.value.indices) <= {1, 6}
    assert caught.value.indices
    c.close()


async def test_one_broken_block_of_a_large_copy_is_told(arena, two_threads):
    c = copier(arena)
    records = offer(arena, list(range(8)))
    arena.bytes_view()[7, 9] ^= 1
    with pytest.raises(DigestMismatchError, match="block 7 "):
        await c.copy(Memory(arena.bytes_view(), arena.generations), records, list(range(8)))
    c.close()


@given(st.integers(1, 40), st.integers(1, 5))
def test_parts_of_a_job_are_the_job(count, parts):
    records = [BlockRecord(n, b"", n, 0, 0, 1) for n in range(count)]
    memory = Memory(np.zeros((count, 4), np.uint8), np.zeros(count, np.uint64))
    found = CopyJob(memory, np.zeros((count, 4), np.uint8), records, range(count), False).parts(parts)
    assert [r for one in found for r in one.records] == records
    assert [b for one in found for b in one.dest_blocks] == list(range(count))
    assert len(found) <= parts
    assert all(one.records for one in found)
