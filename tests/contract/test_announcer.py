"""A worker keeps the directory told, through everything that happens to the directory, and hears who else is there."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

from kv_peers import EPOCH, KEYS, LAYOUT
from worker_harness import until

from core.blocks import KvSource
from core.clock import ManualClock, SystemClock
from core.inventory import Inventory
from core.request import WorkerRole
from kvtransfer import announcer as announcer_module
from kvtransfer.announcer import Announcer
from kvtransfer.directory import DirectoryError, NodeRecord
from kvtransfer.local_directory import ClockedDirectory, LocalDirectory

HERE = NodeRecord(KvSource("here", EPOCH, "127.0.0.1:1"), LAYOUT, WorkerRole.DECODE)
OTHER = NodeRecord(KvSource("other", 1, "127.0.0.1:2"), LAYOUT, WorkerRole.PREFILL)


class ShakyDirectory(ClockedDirectory):
    """Away while `away` is set; can be restarted empty."""

    def __init__(self) -> None:
        super().__init__(LocalDirectory(), SystemClock())
        self.away = False
        self.joins = self.announces = 0

    def restart(self) -> None:
        self._table = LocalDirectory()

    async def join(self, record, ttl_s):
        self.joins += 1
        self._check()
        return await super().join(record, ttl_s)

    async def announce(self, worker_id, epoch, added, removed):
        self.announces += 1
        self._check()
        return await super().announce(worker_id, epoch, added, removed)

    async def leave(self, worker_id, epoch):
        self._check()
        await super().leave(worker_id, epoch)

    def _check(self) -> None:
        if self.away:
            raise DirectoryError("the directory is away")

    async def knows(self, keys) -> int:
        return len((await self.locate(keys)).holders)


class World:
    def __init__(self, ttl_s: float = 0.6) -> None:
        self.directory = ShakyDirectory()
        self.inventory = Inventory(64)
        self.heard, self.nodes = [], []
        self.announcer = Announcer(
            self.directory,
            self.inventory,
            lambda: HERE,
            ttl_s,
            SystemClock(),
            added=self.heard.extend,
            met=lambda nodes: self.nodes.append([node.source.worker_id for node in nodes]),
        )

    def put(self, keys) -> None:
        blocks = self.inventory.allocate(len(keys))
        for block, key in zip(blocks, keys, strict=True):
            self.inventory.commit(block, key)
        self.inventory.release(blocks)
        self.announcer.poke()


async def until_knows(directory, keys, count) -> None:
    async with asyncio.timeout(20):
        while await directory.knows(keys) != count:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@asynccontextmanager
async def announcing(ttl_s: float = 0.6):
    world = World(ttl_s)
    task = asyncio.create_task(world.announcer.run())
    yield world
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled(), task.exception()


async def test_what_comes_and_goes_is_announced():
    async with announcing() as world:
        world.put(KEYS[:5])
        await until_knows(world.directory, KEYS, 5)
        assert world.heard == KEYS[:5]
        world.put(KEYS[5:9])
        await until_knows(world.directory, KEYS, 9)
        world.inventory.evict(KEYS[3:9])
        world.announcer.poke()
        await until_knows(world.directory, KEYS, 3)
        assert world.announcer.announced == 15


async def test_more_than_one_announcement_holds_is_said_in_several(monkeypatch):
    monkeypatch.setattr(announcer_module, "KEYS_MAX", 4)
    async with announcing() as world:
        world.put(KEYS[:30])
        await until_knows(world.directory, KEYS, 30)
        assert world.directory.announces >= 8
        assert sorted(world.heard) == sorted(KEYS[:30])


async def test_it_hears_who_else_is_there():
    async with announcing() as world:
        await world.directory.join(OTHER, 60.0)
        await until(lambda: world.nodes and world.nodes[-1] == ["here", "other"])


async def test_it_stays_alive_by_joining_again():
    async with announcing(ttl_s=0.3) as world:
        world.put(KEYS[:2])
        await until(lambda: world.directory.joins > 12)
        assert await world.directory.knows(KEYS) == 2


async def test_a_directory_that_forgot_hears_everything_again():
    async with announcing() as world:
        world.put(KEYS[:5])
        await until_knows(world.directory, KEYS, 5)
        world.directory.restart()
        await until_knows(world.directory, KEYS, 5)
        world.directory.restart()
        world.put(KEYS[5:7])  # the announcement finds out before the next join does
        await until_knows(world.directory, KEYS, 7)


async def test_a_directory_that_was_away_hears_what_it_missed():
    async with announcing() as world:
        world.put(KEYS[:5])
        await until_knows(world.directory, KEYS, 5)
        world.directory.away = True
        world.put(KEYS[5:9])
        world.inventory.evict(KEYS[:1])
        await until(lambda: world.announcer.failures >= 2)
        assert world.announcer.failures < 10, "it backs off"
        world.directory.away = False
        await until_knows(world.directory, KEYS[1:], 8)
        assert await world.directory.knows(KEYS) == 0


async def test_what_overflowed_the_memory_of_changes_is_forgotten_and_said_anew():
    async with announcing() as world:
        world.put(KEYS[:8])
        await until_knows(world.directory, KEYS, 8)
        world.inventory.evict(KEYS[:4])
        world.inventory.changes(64, everything=True)  # as if more had gone than is remembered
        world.inventory._log.followed = False
        world.announcer.poke()
        await until_knows(world.directory, KEYS, 0)
        await until_knows(world.directory, KEYS[4:], 4)


async def test_asked_to_it_says_everything_again():
    async with announcing() as world:
        world.put(KEYS[:3])
        await until(lambda: world.heard == KEYS[:3])
        world.announcer.again()
        await until(lambda: world.heard == KEYS[:3] * 2)


async def test_asked_to_say_everything_it_does_not_forget_what_went():
    async with announcing(ttl_s=60.0) as world:
        world.put(KEYS[:5])
        await until_knows(world.directory, KEYS, 5)
        world.inventory.evict(KEYS[2:3])  # nobody has been told
        world.announcer.again()
        await until(lambda: len(world.heard) == 9)
        await until_knows(world.directory, KEYS[3:], 2)
        assert await world.directory.knows(KEYS) == 2, "the one that went is not named"


async def test_what_a_lost_directory_did_not_hear_is_not_said_once_it_is_gone():
    async with announcing() as world:
        world.put(KEYS[:5])
        await until_knows(world.directory, KEYS, 5)
        world.directory.away = True
        world.put(KEYS[5:9])
        await until(lambda: world.announcer.failures >= 1)
        world.inventory.evict(KEYS[5:6])
        world.directory.restart()
        world.directory.away = False
        await until_knows(world.directory, KEYS[6:], 3)
        assert await world.directory.knows(KEYS) == 5


async def test_who_leaves_is_not_found_any_more():
    async with announcing() as world:
        world.put(KEYS[:3])
        await until_knows(world.directory, KEYS, 3)
    await world.announcer.leave()
    assert await world.directory.knows(KEYS) == 0
    world.directory.away = True
    await world.announcer.leave()  # then its time to live runs out


async def test_an_incarnation_that_was_superseded_goes_on_without(caplog):
    async with announcing() as world:
        world.put(KEYS[:3])
        await until_knows(world.directory, KEYS, 3)
        young = NodeRecord(KvSource("here", EPOCH + 1, "127.0.0.1:3"), LAYOUT, WorkerRole.DECODE)
        await world.directory.join(young, 60.0)
        await until(lambda: "not announced" in caplog.text)
        assert await world.directory.knows(KEYS) == 0


async def test_joins_are_frequent_at_first_and_rare_later():
    world, clock = World(), ManualClock(100.0)
    announcer = Announcer(
        world.directory, world.inventory, lambda: HERE, 24.0, clock, added=world.heard.extend, met=world.nodes.append
    )
    due = []
    for _ in range(6):
        await announcer._join()
        due.append(announcer._join_at - clock.now())
    assert due == [1.0, 2.0, 4.0, 8.0, 8.0, 8.0]
