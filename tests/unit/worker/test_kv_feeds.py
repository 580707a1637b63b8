"""Routers that ask hear of a worker's blocks on their sessions: whole, then what changes, and never more than they read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from core.blocks import KEY_BYTES
from core.clock import ManualClock
from core.inventory import Inventory
from core.kv_changes import KEYS_MAX, KvChanges
from worker import kv_feeds
from worker.attempts import Peer
from worker.kv_feeds import BACKLOG_MAX, KvFeeds
from worker.links import RouterLinks
from worker.outbox import Outbox

R1, R2 = Peer("router-1", 1), Peer("router-2", 1)
DEADLINE_S = 10.0


def key(number: int) -> bytes:
    return number.to_bytes(KEY_BYTES, "big")


def compute(inventory: Inventory, *numbers: int) -> None:
    for number in numbers:
        (block,) = inventory.allocate(1)
        inventory.release([inventory.commit(block, key(number))])


async def heard(outbox: Outbox, check: Callable[[list[KvChanges]], bool]) -> list[KvChanges]:
    """Reads until what was heard is enough."""
    changes: list[KvChanges] = []
    async with asyncio.timeout(DEADLINE_S):
        while not check(changes):
            events = await outbox.head()
            assert all(isinstance(event, KvChanges) for event in events)
            changes += events
            outbox.advance(len(events))
    return changes


@pytest.fixture
async def links():
    return RouterLinks(ManualClock(100.0))


@pytest.fixture
async def inventory():
    return Inventory(100_000)


@pytest.fixture
async def feeds(inventory, links):
    feeds = KvFeeds(inventory, links)
    yield feeds
    feeds.close()
    assert len(inventory._logs) == 1, "nobody pays for listeners that are gone"


async def test_a_router_hears_everything_and_then_what_changes(feeds, links, inventory):
    outbox = links.attach(R1, 5)
    compute(inventory, 1, 2)
    feeds.follow(R1, 7)
    assert await heard(outbox, len) == [KvChanges(7, 1, key(1) + key(2))]
    compute(inventory, 3)
    inventory.evict([key(1)])
    feeds.poke()
    assert await heard(outbox, len) == [KvChanges(7, 2, key(3), removed_dram=key(1))]
    feeds.follow(R1, 8)
    assert await heard(outbox, len) == [KvChanges(8, 1, key(2) + key(3))], "asked again, it begins anew"


async def test_routers_that_do_not_ask_hear_nothing(feeds, links, inventory):
    one, other = links.attach(R1, 5), links.attach(R2, 5)
    feeds.follow(R1, 1)
    compute(inventory, 1)
    await heard(one, lambda changes: any(c.added_dram for c in changes))
    assert len(other) == 0


async def test_a_slow_router_is_told_later_and_less(feeds, links, inventory):
    outbox = links.attach(R1, 5)
    count = (BACKLOG_MAX + 2) * KEYS_MAX
    compute(inventory, *range(count))
    feeds.follow(R1, 1)
    async with asyncio.timeout(DEADLINE_S):
        while len(outbox) < BACKLOG_MAX:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    inventory.evict([key(number) for number in range(count - KEYS_MAX, count)])  # of which it had not heard yet
    assert len(outbox) == BACKLOG_MAX
    changes = await heard(outbox, lambda changes: sum(map(len, changes)) >= count - KEYS_MAX)
    assert [c.sequence for c in changes] == list(range(1, BACKLOG_MAX + 2))
    assert not any(c.removed_dram for c in changes)


async def test_a_stream_ends_with_its_session(feeds, links, inventory):
    outbox = links.attach(R1, 5)
    feeds.follow(R1, 1)
    await heard(outbox, len)
    links.detach(R1, outbox)
    compute(inventory, 1)
    feeds.poke()
    async with asyncio.timeout(DEADLINE_S):
        while len(feeds):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_too_many_routers_do_not_make_commits_slow(feeds, links, inventory, monkeypatch):
    monkeypatch.setattr(kv_feeds, "ROUTERS_MAX", 1)
    one, other = links.attach(R1, 5), links.attach(R2, 5)
    feeds.follow(R1, 1)
    feeds.follow(R2, 1)
    await heard(one, len)
    assert (len(feeds), len(other)) == (1, 0)
