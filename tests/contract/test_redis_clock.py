"""The clock of the machine that Redis runs on is set by hours: nodes that live are found again, those that died are not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from directory_rig import TIMEOUT_S, dram, keys, record, shown, until
from redis import Redis
from wall_clock import WallClock

from cli.redis_server import RedisServer, redis_server
from kvtransfer.directory import Tier
from kvtransfer.redis_directory import RedisDirectory

pytestmark = pytest.mark.skipif(not WallClock.available(), reason="a clock to set takes Linux and a C compiler")
TTL_S = 1.0
HOURS_S = 3600
AWAY_S = [5 * HOURS_S, -5 * HOURS_S, 400 * 24 * HOURS_S, -400 * 24 * HOURS_S]
A, B = ("a", 1, Tier.DRAM), ("b", 1, Tier.DRAM)


@pytest.fixture
def clock(tmp_path, monkeypatch) -> Iterator[WallClock]:
    clock = WallClock(tmp_path)
    for name, value in clock.environment.items():
        monkeypatch.setenv(name, value)
    yield clock
    clock.close()


@pytest.fixture
def server(clock) -> Iterator[RedisServer]:
    with redis_server() as server:
        assert clock.rules(server.pid)
        yield server


@pytest.fixture
async def directory(server):
    directory = RedisDirectory(server.url, timeout_s=TIMEOUT_S)
    yield directory
    await directory.close()


def hours_of(server: RedisServer) -> int:
    with Redis(port=server.port) as operator:
        return round(operator.time()[0] / HOURS_S)


@pytest.mark.parametrize("away_s", AWAY_S)
async def test_who_lives_is_found_after_the_next_join(away_s, clock, server, directory):
    hours = hours_of(server)
    await directory.join(record(), TTL_S)
    await directory.announce("a", 1, dram(keys(3)), [])
    clock.set(away_s)
    assert abs(hours_of(server) - hours - away_s // HOURS_S) <= 1
    if not await directory.join(record(), TTL_S):
        assert shown(await directory.locate(keys(3))) == []
        await directory.announce("a", 1, dram(keys(3)), [])
    assert shown(await directory.locate(keys(3))) == [{A}] * 3
    assert await directory.join(record(), TTL_S) is True
    assert await directory.nodes() == [record()]


@pytest.mark.parametrize("away_s", AWAY_S)
async def test_who_died_is_forgotten_as_soon_as_ever(away_s, clock, server, directory):
    """Where the clock went back, the time to live of the dead must not last the hours until it is as late again."""
    await directory.join(record(), TTL_S)
    await directory.announce("a", 1, dram(keys(3)), [])
    await directory.join(record("b"), TTL_S)
    await directory.announce("b", 1, dram(keys(3)), [])
    clock.set(away_s)

    async def forgotten() -> bool:
        if not await directory.join(record("b"), TTL_S):
            await directory.announce("b", 1, dram(keys(3)), [])
        return await directory.nodes() == [record("b")]

    await until(forgotten)
    assert shown(await directory.locate(keys(3))) == [{B}] * 3


async def test_a_clock_that_runs_well_shortens_no_time_to_live(server, directory):
    """A node with a long time to live among some with a short one."""
    await directory.join(record(), 100 * TTL_S)
    for _ in range(3):
        await directory.join(record("b"), TTL_S)
    with Redis(port=server.port) as operator:
        seconds, millionths = operator.time()
        ends = operator.zscore("tandem{0}live", 1)
    assert ends / 1000 > seconds + millionths / 1e6 + 90 * TTL_S
