"""Steady load on a cluster that keeps its KV plane busy: prompts with shared beginnings, more of them than one worker holds."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx
from cluster_up import Cluster
from in_loop import cluster_in_loop

from tandem import AsyncClient, SamplingParams

# 12 blocks of 80 KiB each; a worker holds 51, a store all.
CONFIG = """
redis: REDIS
cluster: {prefill: 2}
store: {dram_bytes: 24MiB, disk_bytes: 64MiB, disk_dir: DISK, directory_ttl_s: 2.0, fetch_always: true}
engine: {kv_bytes: 4MiB}
log_level: warning
"""
BEGINNINGS = [f"# file {n}\n" + "def area(width, height):\n    return width * height\n\n" * 9 for n in range(5)]
PROMPTS = [begin + end for end in ("def volume(", "class Shape:") for begin in BEGINNINGS]
SAMPLING = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
AT_ONCE = 3
DEADLINE_S = 40.0

ENDED = "tandem_worker_attempts_total"
LOST = ("failed", "superseded", "orphaned", "expired")
MISTAKES = [f'{ENDED}{{outcome="{outcome}"' for outcome in LOST] + ["tandem_kv_digest_failures_total"]
"""Attempts that ended for want of something, leases among it, and blocks that were not what they should be."""

Tokens = Mapping[str, tuple[int, ...]]
"""Of each prompt's answer."""


async def reference() -> Tokens:
    """By one worker that computes everything anew."""
    alone = {"cluster.prefill": 0, "cluster.decode": 0, "cluster.colocated": 1, "store.nodes": 0, "engine.prefix_cache": False}
    async with cluster_in_loop(alone) as addresses, AsyncClient(addresses.grpc) as client:
        return {prompt: tuple((await client.generate(prompt, SAMPLING)).token_ids) for prompt in PROMPTS}


@dataclass
class Load:
    """What clients got so far, and what the workers counted that were up when it began."""

    cluster: Cluster
    expected: Tokens
    metrics: list[str]
    http: httpx.AsyncClient
    done: int = 0
    stopped: bool = False

    async def ask_on(self, client: AsyncClient, first: int) -> None:
        """One client: a request that fails, or whose tokens are others, ends the test."""
        for prompt in itertools.islice(itertools.cycle(PROMPTS), first, None):
            if self.stopped:
                return
            result = await client.generate(prompt, SAMPLING)
            assert tuple(result.token_ids) == self.expected[prompt]
            self.done += 1

    async def scrape(self, *names: str) -> Counter[str]:
        """These metrics by sample, each summed over the workers."""
        total = Counter[str]()
        for address in self.metrics:
            for line in (await self.http.get(f"http://{address}/metrics")).text.splitlines():
                if line.startswith(names):
                    sample, _, value = line.rpartition(" ")
                    total[sample] += float(value)  # type: ignore[assignment]
        return total

    async def fetched(self) -> float:
        """Blocks that prefill workers had from elsewhere."""
        found = await self.scrape("tandem_kv_found_blocks_total")
        return sum(blocks for sample, blocks in found.items() if 'source="local"' not in sample)

    async def unanswered(self) -> float:
        return (await self.scrape("tandem_kv_directory_failures_total")).total()

    async def answered(self, more: int) -> None:
        """Returns after so many more requests."""
        until_done = self.done + more
        await until(lambda: reached(lambda: self.done, until_done))

    async def fetches_again(self) -> None:
        """Returns when blocks were fetched that had not been when it was called."""
        before = await self.fetched()
        await until(lambda: grew(self.fetched, before))


@asynccontextmanager
async def load(cluster: Cluster, expected: Tokens) -> AsyncIterator[Load]:
    """Clients ask on until the block ends; none of their requests may fail, or be tried again by the SDK, or by the router."""
    status = await asyncio.to_thread(cluster.status)
    async with (
        AsyncClient(cluster.grpc, timeout_s=30.0, max_retries=0) as client,
        httpx.AsyncClient() as http,
        asyncio.TaskGroup() as group,
    ):
        metrics = [worker["metrics"] for worker in status["workers"] if worker["role"] != "router"]
        running = Load(cluster, expected, metrics, http)
        mistakes = await running.scrape(*MISTAKES)
        for n in range(AT_ONCE):
            group.create_task(running.ask_on(client, n * len(PROMPTS) // AT_ONCE), name=f"client {n}")
        try:
            yield running
            assert await running.scrape(*MISTAKES) == mistakes, cluster.log.read_text()[-4000:]
            assert (await running.scrape(ENDED)).total() >= running.done, "they are counted under this name"
        finally:
            running.stopped = True


async def until(check: Callable[[], Awaitable[bool]]) -> None:
    """Waits for something that announces itself to nobody, gently: the cluster needs the processor."""
    async with asyncio.timeout(DEADLINE_S):
        while not await check():  # noqa: ASYNC110
            await asyncio.sleep(0.1)


async def grew(measure: Callable[[], Awaitable[float]], before: float) -> bool:
    return await measure() > before


async def reached(measure: Callable[[], float], target: float) -> bool:
    return measure() >= target
