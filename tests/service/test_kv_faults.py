"""The Redis that the directory is kept in, killed and halted under load, and everybody's wall clock set by hours under load:
no request fails, no token changes.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from cluster_up import Cluster, tandem_up
from kv_load import CONFIG, PROMPTS, Tokens, grew, load, reference, until
from redis import Redis
from wall_clock import WallClock

from cli.redis_server import RedisServer, redis_server
from core.blocks import BlockKey, block_keys, root_key
from core.config import DEMO_MODEL
from core.text import Tokenizer
from kvtransfer.directory import DirectoryError
from kvtransfer.redis_directory import RedisDirectory

pytestmark = pytest.mark.service
HALTED_S = 3.0
HOUR_S = 3600
ENDED = "tandem_worker_attempts_total"
LOST = ("failed", "superseded", "orphaned", "expired")
MISTAKES = [f'{ENDED}{{outcome="{outcome}"' for outcome in LOST] + ["tandem_kv_digest_failures_total"]
"""Leases that ended while they were needed, and blocks that were not what they should be."""


@pytest.fixture(scope="module")
def expected() -> Tokens:
    return asyncio.run(reference())


@pytest.fixture(scope="module")
def clock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WallClock | None]:
    """Of Redis and the whole cluster; None where such a clock cannot be built."""
    if not WallClock.available():
        yield None
        return
    clock = WallClock(tmp_path_factory.mktemp("clock"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in clock.environment.items():
            patch.setenv(name, value)
        yield clock
    clock.close()


@pytest.fixture(scope="module")
def redis(clock: WallClock | None) -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@pytest.fixture(scope="module")
def cluster(redis: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with tandem_up(tmp_path_factory.mktemp("kv"), config=CONFIG.replace("REDIS", redis.url)) as running:
        running.only("store")
        yield running


class Looker:
    """Looks into Redis as the workers do."""

    def __init__(self, directory: RedisDirectory) -> None:
        self._directory = directory
        self._tokens = Tokenizer.load(DEMO_MODEL)

    async def finds_every_prompt(self) -> bool:
        """Each full block of each prompt, and each at the store, which holds them all."""
        try:
            nodes = await self._directory.nodes()
            layouts = [node.layout for node in nodes if node.layout is not None]
            if not layouts:
                return False
            root = root_key(layouts[0].fingerprint)
            return all([await self._held(block_keys(root, self._tokens.encode(p), layouts[0].block_size)) for p in PROMPTS])
        except DirectoryError:
            return False

    async def _held(self, keys: list[BlockKey]) -> bool:
        located = await self._directory.locate(keys)
        names = [{holder.worker_id for holder in held} for held in located.holders]
        return len(names) == len(keys) and all("store-0" in held for held in names)


@asynccontextmanager
async def looking(redis: RedisServer) -> AsyncIterator[Looker]:
    directory = RedisDirectory(redis.url, timeout_s=2.0)
    try:
        yield Looker(directory)
    finally:
        await directory.close()


async def test_a_redis_killed_under_load_that_comes_back_empty_is_told_everything_again(cluster, redis, expected):
    async with looking(redis) as look, load(cluster, expected) as running:
        await until(look.finds_every_prompt)
        await running.fetches_again()
        before = await running.unanswered()
        redis.kill()
        await until(lambda: grew(running.unanswered, before))
        await running.answered(2 * len(PROMPTS))
        assert not await look.finds_every_prompt(), "it is gone"
        redis.start()
        await until(look.finds_every_prompt)
        await running.fetches_again()


async def test_a_redis_that_is_halted_for_a_while_costs_hits_and_nothing_else(cluster, redis, expected):
    async with looking(redis) as look, load(cluster, expected) as running:
        await until(look.finds_every_prompt)
        before, ends = await running.unanswered(), asyncio.get_running_loop().time() + HALTED_S
        os.kill(redis.pid, signal.SIGSTOP)
        try:
            await until(lambda: grew(running.unanswered, before))
            await running.answered(2 * len(PROMPTS))
            await until(lambda: past(ends))
        finally:
            os.kill(redis.pid, signal.SIGCONT)
        await until(look.finds_every_prompt)
        await running.fetches_again()


async def past(moment: float) -> bool:
    return asyncio.get_running_loop().time() > moment


async def test_nobody_minds_a_wall_clock_that_jumps_by_hours(cluster, redis, clock, expected):
    """Redis' own times to live included: nodes are found again as soon as they said that they live."""
    if clock is None:
        pytest.skip("a clock to set takes Linux and a C compiler")
    before = await asyncio.to_thread(cluster.status)
    assert all(clock.rules(worker["pid"]) for worker in before["workers"])
    async with looking(redis) as look, load(cluster, expected) as running:
        mistakes = await running.scrape(*MISTAKES)
        for hours in (7, -7):
            hour = hour_of(redis)
            clock.set(hours * HOUR_S)
            assert abs(hour_of(redis) - hour) >= 7, "it jumped"
            await running.answered(2 * len(PROMPTS))
            await until(look.finds_every_prompt)
            await running.fetches_again()
        assert await running.scrape(*MISTAKES) == mistakes
        assert await running.scrape(ENDED) > 4 * len(PROMPTS), "they are counted under this name"
    after = await asyncio.to_thread(cluster.status)
    assert [incarnation(one) for one in after["workers"]] == [incarnation(one) for one in before["workers"]]
    assert "Traceback" not in cluster.log.read_text()


def hour_of(redis: RedisServer) -> int:
    with Redis(port=redis.port) as operator:
        return operator.time()[0] // HOUR_S


def incarnation(worker: dict[str, Any]) -> tuple[str, int, str]:
    return worker["id"], worker["epoch"], worker["state"]
