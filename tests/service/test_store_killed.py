"""A store killed under load: no request fails, every token is the same, and a successor is up a moment later."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest
from cluster_up import Cluster, eventually, tandem_up

from tandem import AsyncClient, SamplingParams

pytestmark = pytest.mark.service
CONFIG = "store: {dram_bytes: 16MiB, disk_bytes: 64MiB, disk_dir: DISK}\nengine: {kv_bytes: 4MiB}\n"
PROMPTS = [f"# file {n}\n" + "def area(width, height):\n    return width * height\n\n" * 10 for n in range(8)]
SAMPLING = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
AT_ONCE = 4
ROUNDS = 4


def test_a_store_killed_under_load_costs_nothing_but_time(tmp_path: Path) -> None:
    with tandem_up(tmp_path, config=CONFIG.replace("DISK", str(tmp_path / "disk"))) as cluster:
        store = cluster.only("store")
        asyncio.run(load(cluster, store["pid"]))
        (successor,) = eventually(lambda: [w for w in cluster.workers("store") if w["epoch"] == 2], 40)
        assert successor["pid"] != store["pid"]
        asyncio.run(load(cluster, None))
        blocks = eventually(lambda: cluster.only("store")["blocks"]["cached"])
        assert blocks > 0, "workers offer to the successor"


async def load(cluster: Cluster, victim: int | None) -> None:
    async with AsyncClient(cluster.grpc, timeout_s=60.0, max_retries=0) as client:

        async def ask(prompt: str) -> tuple[int, ...]:
            async with slots:
                result = await client.generate(prompt, SAMPLING)
            done.append(prompt)
            if len(done) == len(PROMPTS) + 5 and victim is not None:
                os.kill(victim, signal.SIGKILL)
            return tuple(result.token_ids)

        slots, done = asyncio.Semaphore(AT_ONCE), list[str]()
        expected = [await ask(prompt) for prompt in PROMPTS]
        answers = await asyncio.gather(*(ask(prompt) for prompt in PROMPTS * ROUNDS))
        assert answers == expected * ROUNDS
