"""After 500 requests with random cancels, disconnects and stops, all blocks are free or cached and no lease is open."""

from __future__ import annotations

import asyncio
import random

import pytest
from cluster_up import eventually, tandem_up

from tandem import AsyncClient, CancelledError, SamplingParams

pytestmark = [pytest.mark.service, pytest.mark.timeout(240)]

REQUESTS, AT_ONCE = 500, 16
CONFIG = "engine: {max_step_tokens: 64, kv_bytes: 4MiB}\ncluster: {heartbeat_s: 0.2}\n"


async def one(client: AsyncClient, rng: random.Random) -> str:
    """One request and the way it ended."""
    prompt = [rng.randrange(300, 4000) for _ in range(rng.choice((3, 40, 150)))]
    params = SamplingParams(
        max_tokens=rng.choice((1, 4, 24)),
        temperature=rng.choice((0.0, 1.0)),
        seed=rng.randrange(99),
        n=rng.choice((1, 1, 1, 2)),
    )
    if rng.random() < 0.2:
        params = SamplingParams(max_tokens=24, stop=("e", "\n"), seed=rng.randrange(99))
    way, after = rng.choice(("finish", "cancel", "disconnect", "immediately")), rng.randrange(6)
    stream = client.stream(prompt, params)
    try:
        if way == "immediately":
            stream.cancel()
            return way
        count = 0
        async for _ in stream:
            count += 1
            if way == "disconnect" and count > after:
                stream.cancel()
                break
            if way == "cancel" and count == after + 1:
                await client.cancel(stream.request_id)
    except CancelledError:
        assert way != "finish"
    return way


async def storm(grpc: str) -> dict[str, int]:
    rng, ends = random.Random(7), dict.fromkeys(("finish", "cancel", "disconnect", "immediately"), 0)
    gate = asyncio.Semaphore(AT_ONCE)

    async def gated(client: AsyncClient, seed: int) -> None:
        async with gate:
            ends[await one(client, random.Random(seed))] += 1

    async with AsyncClient(grpc) as client, asyncio.TaskGroup() as group:
        for _ in range(REQUESTS):
            group.create_task(gated(client, rng.randrange(2**32)))
    return ends


@pytest.mark.parametrize("transport", ["shm", "grpc"])
def test_nothing_leaks(tmp_path, transport):
    with tandem_up(tmp_path, "--transport", transport, config=CONFIG) as cluster:
        ends = asyncio.run(storm(cluster.grpc))
        assert min(ends.values()) > 50, f"the storm was one-sided: {ends}"

        def clean() -> bool:
            workers = [w for w in cluster.status()["workers"] if w["role"] != "router"]
            assert len(workers) == 3, "prefill, decode, store"
            for worker in workers:
                blocks = worker["blocks"]
                assert blocks["free"] + blocks["cached"] == blocks["total"], worker
                assert worker["leases_open"] == worker["running"] == worker["waiting"] == 0, worker
            return True

        eventually(clean)
        assert "Traceback" not in cluster.log.read_text()
