"""The Redis that the directory is kept in, killed and halted under load: no request fails, no token changes."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
from cluster_up import Cluster, tandem_up
from kv_load import CONFIG, PROMPTS, Tokens, grew, load, reference, until

from cli.redis_server import RedisServer, redis_server
from core.blocks import BlockKey, block_keys, root_key
from core.config import DEMO_MODEL
from core.text import Tokenizer
from kvtransfer.directory import DirectoryError
from kvtransfer.redis_directory import RedisDirectory

pytestmark = pytest.mark.service
HALTED_S = 3.0


@pytest.fixture(scope="module")
def expected() -> Tokens:
    return asyncio.run(reference())


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
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
