"""A worker is killed with SIGKILL while 8 requests run: every stream ends with exactly the tokens of the undisturbed run."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable

import pytest
from cluster_up import Cluster, eventually, tandem_up

from tandem import AsyncClient, SamplingParams

pytestmark = [pytest.mark.service, pytest.mark.timeout(180)]

# Without prefix reuse, so that the disturbed run has prompts to compute; small chunks, so that this takes a while.
CONFIG = "engine: {max_step_tokens: 32, prefix_cache: false}\ncluster: {heartbeat_s: 0.2}\n"
LONG = "import asyncio\nimport logging\n\n\nclass Connection:\n    def __init__(self, reader, writer):\n" * 40
PROMPTS = [f"def function_{i}(self, value):\n" for i in range(4)] + [f"# part {i}\n{LONG}" for i in range(4)]
REQUESTS = [
    (prompt, SamplingParams(max_tokens=96, temperature=0.0 if i % 2 else 0.9, seed=i, ignore_eos=True))
    for i, prompt in enumerate(PROMPTS)
]


class Progress:
    """Tokens seen so far per request, and a way to wait for some."""

    def __init__(self) -> None:
        self.tokens: list[list[int]] = [[] for _ in REQUESTS]
        self._moved = asyncio.Event()

    def note(self, index: int, position: int, token_id: int) -> None:
        assert position == len(self.tokens[index]), "a token was repeated or lost"
        self.tokens[index].append(token_id)
        self._moved.set()

    async def until(self, condition: Callable[[list[list[int]]], bool], timeout_s: float = 30.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition(self.tokens):
                self._moved.clear()
                await self._moved.wait()


Disturb = Callable[[Progress], Awaitable[None]]


async def one(client: AsyncClient, index: int, progress: Progress) -> int:
    prompt, params = REQUESTS[index]
    stream = client.stream(prompt, params)
    async for token in stream:
        progress.note(index, token.position, token.token_id)
    return stream.result.failovers


async def all_of(grpc: str, disturb: Disturb | None = None) -> tuple[list[list[int]], list[int]]:
    """Tokens and failovers of every request."""
    progress = Progress()
    async with AsyncClient(grpc) as client, asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(client, i, progress)) for i in range(len(REQUESTS))]
        if disturb is not None:
            await disturb(progress)
    return progress.tokens, [task.result() for task in tasks]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with tandem_up(tmp_path_factory.mktemp("failover"), config=CONFIG) as up:
        yield up


@pytest.fixture(scope="module")
def undisturbed(cluster):
    tokens, failovers = asyncio.run(all_of(cluster.grpc))
    assert not any(failovers)
    return tokens


def replaced(cluster: Cluster, role: str, old: dict) -> None:
    new = cluster.only(role)
    assert new["epoch"] > old["epoch"]
    assert new["pid"] != old["pid"]


def test_decode_killed_in_mid_stream(cluster, undisturbed):
    victim = cluster.only("decode")

    async def disturb(progress):
        await progress.until(lambda seen: sum(len(tokens) > 8 for tokens in seen) >= 4)
        os.kill(victim["pid"], signal.SIGKILL)

    tokens, failovers = asyncio.run(all_of(cluster.grpc, disturb))
    assert tokens == undisturbed
    assert any(failovers), "nothing was running when the worker was killed"
    replaced(cluster, "decode", victim)


def test_prefill_killed_in_mid_prefill(cluster, undisturbed):
    victim = cluster.only("prefill")

    async def disturb(progress):
        await progress.until(any)  # a short prompt is through, the long ones are being computed
        os.kill(victim["pid"], signal.SIGKILL)

    tokens, failovers = asyncio.run(all_of(cluster.grpc, disturb))
    assert tokens == undisturbed
    assert any(failovers), "nothing was being prefilled when the worker was killed"
    replaced(cluster, "prefill", victim)


def test_nothing_is_held_afterwards(cluster):
    def clean() -> bool:
        for worker in cluster.workers("prefill") + cluster.workers("decode"):
            blocks = worker["blocks"]
            assert blocks["free"] + blocks["cached"] == blocks["total"], worker
            assert worker["leases_open"] == 0, worker
        return True

    eventually(clean)
