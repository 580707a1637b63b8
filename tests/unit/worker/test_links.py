"""Events find the router that owns an attempt; what takes attempts away frees them."""

import asyncio

import pytest

from core.clock import ManualClock
from core.errors import OutOfBlocksError
from core.request import AttemptKey, AttemptTiming, TokenEvent
from worker.attempts import Peer, Refused
from worker.links import RouterLinks
from worker.messages import AttemptFailed, Joined, StepTokens
from worker.outbox import Outbox

R1, R2 = Peer("router-1", 1), Peer("router-2", 1)


def key(request: str, attempt: int = 1) -> AttemptKey:
    return AttemptKey(request, attempt)


def drain(outbox: Outbox) -> list[object]:
    events = list(outbox._events)
    outbox._events.clear()
    return events


@pytest.fixture
def clock():
    return ManualClock(100.0)


@pytest.fixture
def stopped():
    return []


@pytest.fixture
async def links(clock, stopped):
    links = RouterLinks(clock, outbox_bound=4)
    links.bind(stopped.append)
    yield links
    links.table.check()


async def test_one_step_is_one_message_per_router(links):
    first, second = links.attach(R1, 5), links.attach(R2, 5)
    for request, peer in (("a", R1), ("b", R2), ("c", R1)):
        assert links.admit(key(request), peer) is None
    links.send_tokens([TokenEvent(key(r), 0, 7) for r in ("a", "b", "c", "nobody")])
    assert drain(first) == [StepTokens((TokenEvent(key("a"), 0, 7), TokenEvent(key("c"), 0, 7)))]
    assert drain(second) == [StepTokens((TokenEvent(key("b"), 0, 7),))]
    assert links.tokens_sent == 3


async def test_events_of_an_ended_attempt_go_nowhere(links, stopped):
    outbox = links.attach(R1, 5)
    links.admit(key("a", 1), R1)
    links.admit(key("a", 2), R1)
    assert stopped == [key("a", 1)]
    links.send(Joined(key("a", 1), AttemptTiming()))
    links.send_tokens([TokenEvent(key("a", 1), 0, 7)])
    assert drain(outbox) == []
    assert links.outcomes["superseded"] == 1


async def test_failing_an_attempt_says_so_and_ends_it(links, stopped):
    outbox = links.attach(R1, 5)
    links.admit(key("a"), R1)
    links.fail(key("a"), OutOfBlocksError("too few"))
    assert drain(outbox) == [AttemptFailed(key("a"), "out_of_blocks", "too few", True)]
    assert stopped == [], "who reports a failure has freed the attempt"
    assert not links.is_live(key("a"))
    async with asyncio.timeout(1):
        await links.drained()


async def test_a_reconnecting_router_hears_what_it_missed(links, clock, stopped):
    first = links.attach(R1, 5)
    links.admit(key("a"), R1)
    links.detach(R1, first)
    links.send_tokens([TokenEvent(key("a"), 0, 7)])
    clock.advance(4)
    second = links.attach(R1, 5)
    clock.advance(100)
    links.expire()
    assert drain(second) == [StepTokens((TokenEvent(key("a"), 0, 7),))]
    assert stopped == []
    assert await first.head() == [], "a reader of the old box stops"


async def test_a_router_that_stays_away_loses_its_attempts(links, clock, stopped):
    outbox = links.attach(R1, 5)
    links.admit(key("a"), R1)
    links.detach(R1, outbox)
    clock.advance(5)
    links.expire()
    assert stopped == [key("a")]
    assert links.outcomes["orphaned"] == 1
    assert not links._links


async def test_a_second_session_of_a_router_replaces_the_first(links):
    first = links.attach(R1, 5)
    links.admit(key("a"), R1)
    second = links.attach(R1, 5)
    links.detach(R1, first)
    links.send(Joined(key("a"), AttemptTiming()))
    assert len(second) == 1
    assert links.table.expire(now=1e9) == [], "the break of the replaced session starts no lease"


async def test_a_router_too_far_behind_is_given_up_with_its_attempts(links, stopped):
    outbox = links.attach(R1, 5)
    other = links.attach(R2, 5)
    links.admit(key("a"), R1)
    links.admit(key("b"), R2)
    for position in range(5):
        links.send_tokens([TokenEvent(key("a"), position, 7)])
    assert stopped == [key("a")]
    assert not outbox.put(StepTokens(()))
    links.send(Joined(key("b"), AttemptTiming()))
    assert len(other) == 1, "other routers notice nothing"


async def test_a_draining_worker_refuses_and_reports_when_empty(links):
    links.attach(R1, 5)
    links.admit(key("a"), R1)
    links.accepting = False
    assert isinstance(links.admit(key("b"), R1), Refused)
    waiting = asyncio.create_task(links.drained())
    await asyncio.sleep(0)
    assert not waiting.done()
    links.finish(key("a"))
    async with asyncio.timeout(1):
        await waiting
    assert links.outcomes == {"refused": 1, "finished": 1}


async def test_nothing_is_remembered_of_a_router_that_left_with_nothing(links):
    outbox = links.attach(R1, 5)
    links.admit(key("a"), R1)
    links.detach(R1, outbox)
    links.finish(key("a"))
    assert not links._links
    idle = links.attach(R2, 5)
    links.detach(R2, idle)
    assert not links._links
