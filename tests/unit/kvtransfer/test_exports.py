"""The source's register: order of announcements, digests, leases."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from core.blocks import BlockRecord, Closing
from core.clock import ManualClock
from core.errors import LeaseExpiredError, StaleEpochError, TransferError
from core.inventory import Inventory
from core.request import AttemptKey
from kvtransfer.arena import HostArena
from kvtransfer.codec import digest_of
from kvtransfer.exports import Exports
from kvtransfer.handoff import ExportState

KEY = AttemptKey("r", 1)
CLOSING = Closing(32, (1,), False)


class World:
    def __init__(self, block_bytes=1024, digest=True):
        self.clock = ManualClock(100.0)
        self.arena = HostArena(64, block_bytes)
        self.arena.bytes_view()[:] = np.random.default_rng(1).integers(0, 256, self.arena.bytes_view().shape, np.uint8)
        self.inventory = Inventory(64, self.arena.generation_words())
        self.exports = Exports(5, self.arena, self.inventory, self.clock, digest=digest)
        self.ends = []
        self.exports.on_end = lambda key, state: self.ends.append((key, state))
        self.made = 0

    def blocks(self, count, key=KEY):
        """Committed blocks, leased to the attempt as the engine does it."""
        records = []
        for block in self.inventory.allocate(count):
            self.made += 1
            name = self.made.to_bytes(16, "big")
            self.inventory.commit(block, name)
            self.inventory.lease(key, [block], self.clock.now() + 10.0)
            self.inventory.release([block])
            records.append(BlockRecord(len(records), name, block, self.inventory.generation(block), 0, 16))
        return records

    def digest(self, record):
        return digest_of(self.arena.bytes_view()[record.block_id])


@pytest.fixture
async def world():
    world = World()
    yield world
    await world.exports.close()
    world.inventory.check()


async def told(follower):
    async with asyncio.timeout(5):
        return (await follower.news())[0]


async def test_digests_are_computed_once_and_kept(world):
    world.exports.open(KEY, 10.0)
    records = world.blocks(2)
    world.exports.announce(KEY, records)
    news = await told(world.exports.follow(KEY, 5))
    assert news.records == tuple(replace(r, digest=world.digest(r)) for r in records)
    assert [world.inventory.digest(r.block_id) for r in records] == [r.digest for r in news.records]
    world.arena.bytes_view()[records[0].block_id] ^= 1  # not looked at again
    world.exports.announce(KEY, records)
    assert (await told(world.exports.follow(KEY, 5))).records[2:] == news.records


async def test_digests_can_be_off():
    world = World(digest=False)
    world.exports.open(KEY, 10.0)
    records = world.blocks(2)
    world.exports.announce(KEY, records)
    assert (await told(world.exports.follow(KEY, 5))).records == tuple(records)
    await world.exports.close()


async def test_a_closing_record_never_overtakes_blocks():
    world = World(block_bytes=5_000_000)  # digests go to the thread
    world.exports.open(KEY, 10.0)
    follower = world.exports.follow(KEY, 5)
    records = world.blocks(6)
    for record in records[:-1]:
        world.exports.announce(KEY, [record])
    world.exports.close_(KEY, CLOSING, replace(records[-1], key=b""))
    heard = []
    while True:
        news = await told(follower)
        heard += news.records
        if news.closing:
            break
    assert [r.index for r in heard] == list(range(6))
    assert [r.digest for r in heard] == [world.digest(r) for r in records]
    assert world.inventory.digest(records[-1].block_id) == 0, "an unfinished block has no digest to keep"
    await world.exports.close()


@pytest.mark.parametrize("block_bytes", [4_000, 5_000_000], ids=["digested on the spot", "digested by a thread"])
async def test_a_mistake_in_one_announcement_does_not_hold_up_the_others(block_bytes, caplog):
    world = World(block_bytes=block_bytes)
    other = AttemptKey("other", 1)
    for key in (KEY, other):
        world.exports.open(key, 10.0)
    follower = world.exports.follow(other, 5)
    (record,) = world.blocks(1, other)
    world.exports.announce(KEY, [BlockRecord(0, b"", 64, 1, 0, 16)])  # the arena ends at 63
    world.exports.announce(other, [record])
    assert (await told(follower)).records == (replace(record, digest=world.digest(record)),)
    assert world.ends == [(KEY, ExportState.REVOKED)]
    assert "announcing blocks of r@1 failed" in caplog.text
    await world.exports.close()


async def test_a_digest_of_a_block_that_was_reused_meanwhile_is_not_kept(world):
    world.exports.open(KEY, 10.0)
    (record,) = world.blocks(1)
    world.exports.announce(KEY, [replace(record, generation=record.generation - 1)])
    assert world.inventory.digest(record.block_id) == 0


@pytest.mark.parametrize(
    ("end", "state"),
    [
        (lambda w: w.exports.done(KEY), ExportState.DONE),
        (lambda w: w.exports.revoke(KEY, "cancelled"), ExportState.REVOKED),
        (lambda w: w.clock.advance(11) or w.exports.expire(w.clock.now()), ExportState.EXPIRED),
    ],
)
async def test_every_end_frees_the_blocks_and_is_told_once(world, end, state):
    world.exports.open(KEY, 10.0)
    follower = world.exports.follow(KEY, 5)
    world.exports.announce(KEY, world.blocks(3))
    world.exports.close_(KEY, CLOSING)
    assert world.inventory.leases_open() == 1
    end(world)
    end(world)
    assert world.inventory.leases_open() == 0
    assert world.inventory.counts().active == 0
    assert len(world.exports) == 0
    assert world.exports.ended[state] == 1
    assert len(world.ends) == 1
    assert (await told(follower)).ended
    with pytest.raises(LeaseExpiredError):
        world.exports.find(KEY, 5)


@pytest.mark.parametrize("key", [KEY, AttemptKey("never", 3)])
async def test_what_closes_after_its_end_holds_no_lease(world, key):
    """The puller gave up while the prompt was still computed; the engine leases the blocks all the same."""
    world.exports.open(KEY, 10.0)
    world.exports.done(KEY)
    world.exports.announce(key, world.blocks(2, key))
    world.exports.close_(key, CLOSING)
    assert world.inventory.leases_open() == 0


async def test_renewals_lengthen_export_and_lease(world):
    world.exports.open(KEY, 10.0)
    world.exports.announce(KEY, world.blocks(2))
    world.exports.close_(KEY, CLOSING)
    for _ in range(5):
        world.clock.advance(8.0)
        assert world.exports.renew(KEY)
        assert world.exports.expire(world.clock.now()) == []
    world.clock.advance(10.0)
    assert world.exports.expire(world.clock.now()) == [KEY]
    assert not world.exports.renew(KEY)


async def test_a_higher_attempt_revokes_the_lower(world):
    world.exports.open(KEY, 10.0)
    follower = world.exports.follow(KEY, 5)
    world.exports.announce(KEY, world.blocks(2))
    second = AttemptKey("r", 2)
    world.exports.open(second, 10.0)
    assert "superseded by attempt 2" in (await told(follower)).ended
    for key in (KEY, second):
        with pytest.raises(TransferError, match="superseded by attempt 2"):
            world.exports.open(key, 10.0)
    assert world.inventory.leases_open() == 0
    world.exports.revoke(KEY, "late cancel")
    assert world.exports.find(second, 5).key == second


async def test_only_the_newest_follower_is_told(world):
    world.exports.open(KEY, 10.0)
    first = world.exports.follow(KEY, 5)
    waiting = asyncio.create_task(told(first))
    second = world.exports.follow(KEY, 5)
    assert (await waiting).ended == "another follower took over"
    world.exports.unfollow(first)
    world.exports.announce(KEY, world.blocks(1))
    assert len((await told(second)).records) == 1


@pytest.mark.parametrize("epoch", [4, 6])
async def test_another_epoch_is_refused(world, epoch):
    world.exports.open(KEY, 10.0)
    with pytest.raises(StaleEpochError):
        world.exports.follow(KEY, epoch)


async def test_closing_revokes_what_is_left(world):
    world.exports.open(KEY, 10.0)
    world.exports.announce(KEY, world.blocks(2))
    await world.exports.close()
    assert world.exports.ended == {ExportState.REVOKED: 1}
    assert world.inventory.leases_open() == 0
