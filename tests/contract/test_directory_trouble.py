"""A Redis that is away, empty, slow, full or damaged: a miss within the deadline, and never anything else."""

from __future__ import annotations

import asyncio
import time

import pytest
from directory_rig import (
    DEADLINE_S,
    TTL_S,
    Proxy,
    dram,
    keys,
    record,
    shown,
    until,
)
from redis import Redis

from cli.redis_server import redis_server
from core.clock import SystemClock
from kvtransfer.directory import DirectoryError, Tier
from kvtransfer.redis_directory import RedisDirectory
from kvtransfer.redis_layout import BUCKET_BYTES, BUCKETS

SHORT_S = 0.5
HELD = {("a", 1, Tier.DRAM)}


@pytest.fixture
def server():
    with redis_server() as server:
        yield server


@pytest.fixture
async def opened():
    """Makes directories that are closed whatever happens."""
    made = []

    def make(url: str, timeout_s: float = DEADLINE_S, **others) -> RedisDirectory:
        made.append(RedisDirectory(url, timeout_s=timeout_s, **others))
        return made[-1]

    yield make
    for directory in made:
        await directory.close()


@pytest.fixture
async def patient(server, opened):
    """A directory that waits far longer than any call takes."""
    return opened(server.url)


async def answers(directory: RedisDirectory) -> bool:
    try:
        return shown(await directory.locate(keys(3))) == [HELD] * 3
    except DirectoryError:
        return False


async def test_redis_stops_and_comes_back_empty(server, opened):
    """Misses while it is away, within the deadline; then joins are answered False, so that all is announced again."""
    directory = opened(server.url, SHORT_S)
    await directory.join(record(), TTL_S)
    await directory.announce("a", 1, dram(keys(3)), [])
    assert await answers(directory)
    server.kill()
    for call in (
        lambda: directory.locate(keys(3)),
        lambda: directory.join(record(), TTL_S),
        lambda: directory.announce("a", 1, dram(keys(3)), []),
        lambda: directory.leave("a", 1),
        lambda: directory.nodes(),
    ):
        with pytest.raises(DirectoryError, match=r"127\.0\.0\.1"):
            await call()
    server.start()

    async def joined_anew():
        try:
            return await directory.join(record(), TTL_S) is False
        except DirectoryError:
            return False

    await until(joined_anew)
    assert await directory.join(record(), TTL_S) is True
    assert shown(await directory.locate(keys(3))) == []
    await directory.announce("a", 1, dram(keys(3)), [])
    await until(lambda: answers(directory))


async def test_an_emptied_redis_is_noticed(server, patient):
    await patient.join(record(), TTL_S)
    await patient.announce("a", 1, dram(keys(3)), [])
    with Redis(port=server.port) as operator:
        operator.flushall()
    assert shown(await patient.locate(keys(3))) == []
    assert await patient.announce("a", 1, dram(keys(3)), []) is False
    assert await patient.join(record(), TTL_S) is False


async def test_a_redis_that_forgot_the_last_announcement_is_noticed(server, patient):
    """As when it restarts from an old snapshot, or a replica takes over that had not heard all."""
    await patient.join(record(), TTL_S)
    await patient.announce("a", 1, dram(keys(3)), [])
    with Redis(port=server.port) as operator:
        saved = {name: operator.dump(name) for name in operator.scan_iter()}
        await patient.announce("a", 1, [], dram(keys(1)))
        operator.flushall()
        for name, value in saved.items():
            operator.restore(name, 0, value)
    assert await patient.join(record(), TTL_S) is False
    assert shown(await patient.locate(keys(3))) == [], "what it remembers is not what was said"


async def test_a_stalled_redis_costs_one_deadline_and_then_nothing(server, opened):
    async with Proxy(server.port) as proxy:
        directory = opened(f"redis://127.0.0.1:{proxy.port}", SHORT_S)
        await directory.join(record(), TTL_S)
        await directory.announce("a", 1, dram(keys(3)), [])
        assert await answers(directory)
        proxy.stall()
        began = time.monotonic()
        with pytest.raises(DirectoryError):
            await directory.locate(keys(3))
        assert time.monotonic() - began < 20 * SHORT_S, "far over the deadline, however busy this machine"
        refused = 0
        for _ in range(200):
            with pytest.raises(DirectoryError) as caught:
                await directory.locate(keys(3))
            refused += "left alone" in str(caught.value)
        assert refused > 150, "only a few were to try"
        proxy.flow()
        await until(lambda: answers(directory))


async def test_an_announcement_that_timed_out_is_asked_for_again(server, opened):
    async with Proxy(server.port) as proxy:
        directory = opened(f"redis://127.0.0.1:{proxy.port}", SHORT_S)
        await directory.join(record(), TTL_S)
        await directory.announce("a", 1, dram(keys(3)), [])
        proxy.stall()
        with pytest.raises(DirectoryError):
            await directory.announce("a", 1, [], dram(keys(3)))
        proxy.flow()
        known = []

        async def joined():
            try:
                known.append(await directory.join(record(), TTL_S))
            except DirectoryError:
                return False
            return True

        await until(joined)
        assert known == [False]
        await until(joined)
        assert known == [False, True]


async def test_connections_cut_under_calls(server, opened):
    async with Proxy(server.port) as proxy:
        directory = opened(f"redis://127.0.0.1:{proxy.port}")
        await directory.join(record(), TTL_S)
        await directory.announce("a", 1, dram(keys(3)), [])
        for _ in range(20):
            call = asyncio.create_task(directory.locate(keys(3)))
            await asyncio.sleep(0)
            proxy.cut()
            try:
                assert shown(await call) == [HELD] * 3
            except DirectoryError:
                await until(lambda: answers(directory))


async def test_a_full_redis_takes_no_more_and_still_answers(server, patient):
    await patient.join(record(), TTL_S)
    await patient.announce("a", 1, dram(keys(3)), [])
    with Redis(port=server.port) as operator:
        operator.config_set("maxmemory", 1)
        with pytest.raises(DirectoryError):
            await patient.announce("a", 1, dram(keys(9)), [])
        assert shown(await patient.locate(keys(3))) == [HELD] * 3
        operator.config_set("maxmemory", 0)
    assert await patient.join(record(), TTL_S) is False


async def test_foreign_bytes_under_our_names(server, patient):
    """Somebody else's data, or damage: misses, no crash."""
    await patient.join(record(), TTL_S)
    await patient.announce("a", 1, dram(keys(40)), [])
    with Redis(port=server.port) as operator:
        buckets = [bucket for bucket in operator.hkeys("tandem{0}entries") if len(bucket) == BUCKET_BYTES]
        assert len(buckets) == 40
        operator.hset("tandem{0}entries", mapping=dict.fromkeys(buckets, b"\xff" * 57))
    assert shown(await patient.locate(keys(40))) == []
    with Redis(port=server.port) as operator:
        for number in operator.hkeys("tandem{0}record"):
            operator.hset("tandem{0}record", number, b"\xff damaged")
    assert await patient.nodes() == []
    assert await patient.join(record(), TTL_S) is True
    assert await patient.nodes() == [record()]
    with Redis(port=server.port) as operator:
        operator.set("tandem{0}entries", "no hash")
    with pytest.raises(DirectoryError, match="WRONGTYPE"):
        await patient.locate(keys(40))


async def test_entries_that_redis_evicted_are_announced_again(server, patient):
    """All at once, as `maxmemory-policy allkeys-lru` may do: the node's own record is still there."""
    await patient.join(record(), TTL_S)
    await patient.announce("a", 1, dram(keys(40)), [])
    with Redis(port=server.port) as operator:
        assert operator.object("encoding", "tandem{0}entries") == b"hashtable", "small ones would be scanned"
        operator.delete("tandem{0}entries")
    assert shown(await patient.locate(keys(40))) == []
    assert await patient.join(record(), TTL_S) is False
    await patient.announce("a", 1, dram(keys(40)), [])
    assert shown(await patient.locate(keys(40))) == [HELD] * 40


async def test_what_dead_nodes_held_is_swept_out(server, patient):
    with Redis(port=server.port) as operator:
        await patient.join(record(), TTL_S)
        await patient.join(record("b"), TTL_S)
        await patient.announce("a", 1, dram(keys(600)), [])
        await patient.announce("b", 1, dram(keys(300)), [])
        before = operator.hlen("tandem{0}entries")
        assert await patient.join(record(epoch=2), TTL_S) is False
        assert shown(await patient.locate(keys(3))) == [{("b", 1, Tier.DRAM)}] * 3

        async def swept():
            return not operator.exists("tandem{0}dead")

        operator.hset("tandem{0}dead", "1", 128 * 40)  # as if most of the way were done
        await until(swept)
        assert operator.hlen("tandem{0}record") == operator.zcard("tandem{0}live") == operator.hlen("tandem{0}owner") == 2
        assert operator.hlen("tandem{0}entries") <= before
        assert len((await patient.locate(keys(600))).holders) == 300
        assert operator.get("tandem{0}cursor") is not None
        assert int(operator.get("tandem{0}cursor")) < BUCKETS


async def test_the_clock_of_the_breaker_is_the_callers(server, opened):
    class Stuck(SystemClock):
        def now(self) -> float:
            return 100.0

    directory = opened("redis://127.0.0.1:1", SHORT_S, clock=Stuck())
    with pytest.raises(DirectoryError, match="Connect call failed"):
        await directory.locate(keys(1))
    for _ in range(5):
        with pytest.raises(DirectoryError, match="left alone"):
            await directory.locate(keys(1))
