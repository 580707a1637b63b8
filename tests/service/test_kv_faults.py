"""Under load: the Redis that the directory is kept in killed and halted, everybody's wall clock set by hours, a reader that
holds blocks and says no more, a disk that takes no more. No request fails, no token changes.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import resource
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from cluster_up import Cluster, eventually, tandem_up
from kv_load import CONFIG, PROMPTS, SAMPLING, Tokens, grew, load, reference, until
from redis import Redis
from wall_clock import WallClock

from cli.redis_server import RedisServer, redis_server
from core.blocks import BlockKey, KvLayout, block_keys, root_key
from core.config import DEMO_MODEL
from core.text import Tokenizer
from core.wire import layout_to_pb
from kvtransfer.directory import DirectoryError, NodeRecord
from kvtransfer.redis_directory import RedisDirectory
from tandem import AsyncClient
from tandem.v1 import common_pb2, kv_pb2, kv_pb2_grpc

pytestmark = [pytest.mark.service, pytest.mark.timeout(240)]
HALTED_S = 3.0
HOUR_S = 3600


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
    folder = tmp_path_factory.mktemp("kv")
    with tandem_up(folder, config=CONFIG.replace("REDIS", redis.url).replace("DISK", str(folder / "disk"))) as running:
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
            nodes = await self.nodes()
            layout = next((node.layout for node in nodes if node.layout is not None), None)
            return layout is not None and all([await self._held(self.keys(layout, prompt)) for prompt in PROMPTS])
        except DirectoryError:
            return False

    async def nodes(self) -> list[NodeRecord]:
        return await self._directory.nodes()

    def keys(self, layout: KvLayout, prompt: str) -> list[BlockKey]:
        return block_keys(root_key(layout.fingerprint), self._tokens.encode(prompt), layout.block_size)

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
        for hours in (7, -7):
            hour = hour_of(redis)
            clock.set(hours * HOUR_S)
            assert abs(hour_of(redis) - hour) >= 7, "it jumped"
            await running.answered(2 * len(PROMPTS))
            await until(look.finds_every_prompt)
            await running.fetches_again()
    after = await asyncio.to_thread(cluster.status)
    assert [incarnation(one) for one in after["workers"]] == [incarnation(one) for one in before["workers"]]
    assert "Traceback" not in cluster.log.read_text()


def hour_of(redis: RedisServer) -> int:
    with Redis(port=redis.port) as operator:
        return operator.time()[0] // HOUR_S


def incarnation(worker: dict[str, Any]) -> tuple[str, int, str]:
    return worker["id"], worker["epoch"], worker["state"]


async def test_a_reader_that_never_renews_loses_its_lease_at_every_node(cluster, redis, expected):
    """It asks each node, store and workers alike, to hold what it has of a prompt, and is not heard of again."""
    async with looking(redis) as look, load(cluster, expected) as running:
        await until(look.finds_every_prompt)
        granted = [
            await hold(node, look.keys(node.layout, PROMPTS[0])) for node in await look.nodes() if node.layout is not None
        ]
        assert len(granted) == 4
        assert any(records for records in granted)
        await running.answered(len(PROMPTS))
    status = await asyncio.to_thread(eventually, lambda: nothing_leased(cluster.status()))
    assert {one["role"] for one in status["workers"]} == {"prefill", "decode", "store", "router"}


async def hold(node: NodeRecord, keys: list[BlockKey]) -> int:
    """How many of them the node holds, for half a second."""
    key = common_pb2.AttemptKey(request_id="hold/forgetful/1", attempt=1)
    epoch, layout = node.source.epoch, layout_to_pb(node.layout)
    request = kv_pb2.HoldRequest(holder=key, epoch=epoch, layout=layout, keys=keys, lease_s=0.5)
    async with grpc.aio.insecure_channel(node.source.grpc_address) as channel:
        return len((await kv_pb2_grpc.KvStub(channel).Hold(request, timeout=10.0)).records)


def nothing_leased(status: dict[str, Any]) -> dict[str, Any] | None:
    return None if any(one["leases_open"] for one in status["workers"]) else status


async def test_a_disk_that_takes_no_more_is_done_without(cluster, redis, expected):
    """The kernel refuses the store every further byte of a file, as a full disk does."""
    store = await asyncio.to_thread(cluster.only, "store")
    async with looking(redis) as look, load(cluster, expected) as running, AsyncClient(cluster.grpc, timeout_s=30.0) as client:

        async def given_up() -> float:
            return (await running.scrape("tandem_kv_disk_writes_off")).total()

        async def on_disk() -> float:
            return (await running.scrape("tandem_kv_disk_blocks")).total()

        await until(lambda: grew(on_disk, 0))  # its memory and its files are there: it is writing that fails
        assert await given_up() == 0
        resource.prlimit(store["pid"], resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
        fresh = itertools.count()

        async def refused() -> bool:
            await client.generate(f"# nobody has asked this before: {next(fresh)}\n" * 20, SAMPLING)
            return await grew(given_up, 0)

        await until(refused)
        await running.answered(2 * len(PROMPTS))
        await until(look.finds_every_prompt)
        await running.fetches_again()
    after = await asyncio.to_thread(cluster.only, "store")
    assert "disk off" in after["detail"]
    assert after["epoch"] == store["epoch"], "it lives on"
