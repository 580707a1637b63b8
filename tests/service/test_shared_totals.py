"""Router replicas that share what tenants were served, through a real Redis that comes and goes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from dataclasses import replace

import pytest
from router_rig import request, rig

from cli.redis_server import RedisServer, redis_server
from cluster.shared_totals import TENANTS_AT_A_TIME, RedisTotals
from core.clock import SystemClock
from core.config import RouterConfig
from core.errors import ConfigError, QuotaExceededError
from router.exchange import Exchange
from router.order import Waiting
from router.sharing import Service
from router.waiting_room import WaitingRoom

pytestmark = pytest.mark.service


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@contextlib.asynccontextmanager
async def sharing(room: WaitingRoom, url: str):
    totals = RedisTotals(url)
    try:
        yield Exchange(room, totals, SystemClock(), every_s=0.01)
    finally:
        await totals.close()


def room(**config: object) -> WaitingRoom:
    return WaitingRoom(RouterConfig.model_validate(config))


def interested(*rooms: WaitingRoom) -> None:
    """Requests of both tenants wait everywhere."""
    for number, each in enumerate(rooms):
        for tenant in "ab":
            each.queue.add(Waiting(f"{number}{tenant}", tenant))


async def test_a_tenant_served_here_has_had_its_turn_there(redis: RedisServer):
    one, two = room(), room()
    interested(one, two)
    async with sharing(one, redis.url) as first, sharing(two, redis.url) as second:
        assert await first.once()
        assert await second.once()
        one.generated("a", 500, 0.0)
        assert two.queue.head(0.0) == "1a"
        assert await first.once()
        assert await second.once()
        assert two.counters.counter("a") == one.counters.counter("a") == 1000
        assert two.queue.head(0.0) == "1b"
        assert await first.once()
        assert one.counters.counter("a") == 1000, "its own service does not come back to it"


async def test_many_tenants_take_several_round_trips(redis: RedisServer):
    totals = RedisTotals(redis.url)
    told = {f"tenant {n} with spaces: 'ü'": Service(n + 0.5, n) for n in range(TENANTS_AT_A_TIME * 2 + 3)}
    try:
        assert await totals.add(told) == list(told.values())
        assert await totals.add(told) == [service.plus(service) for service in told.values()]
    finally:
        await totals.close()


async def test_without_redis_each_goes_by_its_own_and_nothing_is_charged_twice(redis: RedisServer, caplog):
    one, two = room(), room()
    interested(one, two)
    async with sharing(one, redis.url) as first, sharing(two, redis.url) as second:
        for each in (first, second):
            assert await each.once()
        redis.kill()
        one.generated("a", 10, 0.0)
        with caplog.at_level(logging.WARNING):
            assert not await first.once()
            assert not await first.once()
        assert len([line for line in caplog.records if "own counters alone" in line.message]) == 1
        assert (one.counters.counter("a"), two.counters.counter("a")) == (20, 0)
        redis.start()  # empty
        for each in (first, second, first, second):
            assert await each.once()
        assert (one.counters.counter("a"), two.counters.counter("a")) == (20, 20), "what could not be told was kept"
        one.generated("a", 1, 0.0)
        for each in (first, second):
            assert await each.once()
        assert (one.counters.counter("a"), two.counters.counter("a")) == (22, 22)


async def test_a_redis_that_answers_nonsense_is_as_good_as_none(redis: RedisServer):
    one = room()
    interested(one)
    async with sharing(one, redis.url + "?prefix=other") as exchange:
        from redis.asyncio import Redis

        async with Redis.from_url(redis.url) as client:
            await client.set("other{fair}service", "a string")
        one.generated("a", 10, 0.0)
        assert not await exchange.once()
        assert one.counters.counter("a") == 20
    with pytest.raises(ConfigError):
        RedisTotals("http://nowhere")


async def test_a_quota_holds_over_all_routers(redis: RedisServer):
    """Two routers with workers of their own; the tenant's quota is used up at one and found used up at the other."""
    config = RouterConfig.model_validate({"tenants": {"a": {"tokens_per_s": 0.01, "burst_tokens": 60.0}}})
    asked = replace(request(), tenant="a")  # 20 + 16 tokens
    async with rig(config=config) as here, rig(config=config) as there:
        rooms = here.dispatcher.room, there.dispatcher.room
        async with sharing(rooms[0], redis.url) as first, sharing(rooms[1], redis.url) as second:
            for each in (first, second):
                assert await each.once()
            running = [asyncio.create_task(each.run()) for each in (first, second)]
            await here.generate(asked)
            await there.generate(asked)
            for r in (here, there):
                quotas = r.dispatcher.room.quotas
                await r.until(lambda quotas=quotas: quotas.wait_s("a", SystemClock().now()) > 0)
                with pytest.raises(QuotaExceededError):
                    await r.generate(asked)
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
