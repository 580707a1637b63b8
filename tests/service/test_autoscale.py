"""A real cluster that is asked for more than it can bear grows by itself, and says for what it was planned."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from cluster_up import Cluster, eventually, tandem_up

from cli.admin import status
from core.report import Demand
from core.request import WorkerRole
from tandem import AsyncClient, SamplingParams

pytestmark = [pytest.mark.service, pytest.mark.timeout(180)]

CONFIG = """
engine: {kv_bytes: 8MiB, max_step_tokens: 64, threads: 1}
cluster: {heartbeat_s: 0.2, dead_after_s: 60, autoscale: auto, autoscale_max: 2, autoscale_quiet_s: 600}
store: {nodes: 0}
"""
PARAMS = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)


def demand(cluster: Cluster) -> Demand | None:
    """As the controller hears it."""
    return next(one.report.demand for one in status(cluster.admin).members if one.report.role is WorkerRole.ROUTER)


async def ask(address: str, count: int, at_once: int) -> int:
    """Prompt tokens of so many requests."""
    places, total = asyncio.Semaphore(at_once), 0
    async with AsyncClient(address) as client:

        async def one(number: int) -> int:
            async with places:
                result = await client.generate(f"# {number}\n" + "import asyncio\n" * 40, PARAMS)
            return result.usage.prompt_tokens

        for tokens in await asyncio.gather(*map(one, range(count))):
            total += tokens
    return total


def test_routers_report_what_they_were_asked_for_and_pools_grow(tmp_path: Path) -> None:
    with tandem_up(tmp_path, "--colocated", "1", "--prefill", "0", "--decode", "0", config=CONFIG) as cluster:
        tokens = asyncio.run(ask(cluster.grpc, 6, 2))
        found = eventually(lambda: (known := demand(cluster)) and known.answered == 6 and known)
        assert (found.requests, found.prompt_tokens, found.answer_tokens) == (6, tokens, 6 * PARAMS.max_tokens)
        assert found.prompt_squares >= tokens**2 / 6
        assert len(cluster.workers("colocated")) == 1
        asyncio.run(ask(cluster.grpc, 60, 30))
        eventually(lambda: len(cluster.workers("colocated")) == 2, timeout_s=60)
        eventually(lambda: "are wanted" in cluster.log.read_text())
