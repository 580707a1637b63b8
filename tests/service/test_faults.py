"""Hung workers, a lost router, a stopped controller, short memory, hostile input: tokens stay exact, nothing leaks."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable

import grpc
import pytest
from cluster_up import Cluster, eventually, tandem_up

from tandem import AsyncClient, SamplingParams, UnavailableError

pytestmark = [pytest.mark.service, pytest.mark.timeout(180)]

DEAD_AFTER_S = 2.0
# Little memory, so that these requests fit one by one but not together.
CONFIG = f"""
engine: {{kv_bytes: 3MiB, max_step_tokens: 64}}
cluster: {{heartbeat_s: 0.2, dead_after_s: {DEAD_AFTER_S}}}
"""
LINES = "import asyncio\n\n\nclass Connection:\n    def __init__(self, reader, writer):\n" * 4
REQUESTS = [
    (
        f"# part {i}\n{LINES[: 120 * (i % 3)]}",
        SamplingParams(
            max_tokens=192, temperature=0.9 if i % 2 else 0.0, seed=i, ignore_eos=True, frequency_penalty=0.2, logprobs=2
        ),
    )
    for i in range(6)
]

Tokens = list[list[tuple[int, float | None]]]


class Seen:
    """Tokens so far per request, with their log-probabilities, and a way to wait for some."""

    def __init__(self) -> None:
        self.tokens: Tokens = [[] for _ in REQUESTS]
        self._moved = asyncio.Event()

    def note(self, index: int, position: int, token_id: int, logprob: float | None) -> None:
        assert position == len(self.tokens[index]), "a token was repeated or lost"
        self.tokens[index].append((token_id, logprob))
        self._moved.set()

    async def under_way(self, timeout_s: float = 30.0) -> None:
        """Half of the requests stream."""
        async with asyncio.timeout(timeout_s):
            while sum(len(tokens) > 4 for tokens in self.tokens) < len(REQUESTS) // 2:
                self._moved.clear()
                await self._moved.wait()


Disturb = Callable[[Seen], Awaitable[None]]


async def one(client: AsyncClient, index: int, seen: Seen) -> int:
    stream = client.stream(*REQUESTS[index])
    async for token in stream:
        seen.note(index, token.position, token.token_id, token.logprob)
    return stream.result.failovers


async def together(address: str, disturb: Disturb | None = None) -> tuple[Tokens, list[int | BaseException]]:
    """Tokens, and failovers or the error of each request."""
    seen = Seen()
    async with AsyncClient(address) as client:
        tasks = [asyncio.create_task(one(client, i, seen)) for i in range(len(REQUESTS))]
        if disturb is not None:
            await disturb(seen)
        async with asyncio.timeout(90):
            return seen.tokens, await asyncio.gather(*tasks, return_exceptions=True)


async def alone(address: str) -> Tokens:
    seen = Seen()
    async with AsyncClient(address) as client:
        for index in range(len(REQUESTS)):
            assert await one(client, index, seen) == 0
    return seen.tokens


def when_under_way(act: Callable[[], None]) -> Disturb:
    async def disturb(seen: Seen) -> None:
        await seen.under_way()
        act()

    return disturb


def clean(cluster: Cluster) -> bool:
    """All blocks free or cached, no lease, nothing running."""
    workers = cluster.workers("prefill") + cluster.workers("decode")
    assert len(workers) == 2
    for worker in workers:
        blocks = worker["blocks"]
        assert blocks["free"] + blocks["cached"] == blocks["total"], worker
        assert worker["leases_open"] == worker["running"] == worker["waiting"] == 0, worker
    return True


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with tandem_up(tmp_path_factory.mktemp("faults"), config=CONFIG) as up:
        yield up
    log = up.log.read_text()
    assert "Traceback" not in log
    assert "never retrieved" not in log


@pytest.fixture(scope="module")
def undisturbed(cluster):
    return asyncio.run(alone(cluster.grpc))


def test_what_does_not_fit_together_is_given_back_and_continued_exactly(cluster, undisturbed):
    tokens, failovers = asyncio.run(together(cluster.grpc))
    assert tokens == undisturbed
    assert sum(failovers) > 0, "memory was never short"
    eventually(lambda: clean(cluster))


@pytest.mark.parametrize("role", ["decode", "prefill"])
def test_a_worker_that_hangs_is_replaced_and_its_streams_go_on(cluster, undisturbed, role):
    victim = cluster.only(role)
    tokens, ends = asyncio.run(together(cluster.grpc, when_under_way(lambda: os.kill(victim["pid"], signal.SIGSTOP))))
    assert all(isinstance(end, int) for end in ends), ends
    assert tokens == undisturbed
    successor = eventually(lambda: cluster.workers(role), timeout_s=40)[0]
    assert successor["epoch"] > victim["epoch"]
    with pytest.raises(ProcessLookupError):
        os.kill(victim["pid"], signal.SIGCONT)
    eventually(lambda: clean(cluster))


def test_a_killed_router_is_replaced_where_clients_look_for_it(cluster, undisturbed):
    victim = cluster.only("router")
    tokens, ends = asyncio.run(together(cluster.grpc, when_under_way(lambda: os.kill(victim["pid"], signal.SIGKILL))))
    broken = [isinstance(end, UnavailableError) for end in ends]
    assert sum(broken) >= len(REQUESTS) // 2, ends  # those that were under way
    for number, is_broken in enumerate(broken):  # the client asks the new router for those that had not begun
        assert is_broken or (ends[number], tokens[number]) == (0, undisturbed[number]), ends[number]

    def back() -> bool:
        routers = cluster.workers("router")
        return [r["grpc"] for r in routers if r["epoch"] > victim["epoch"]] == [cluster.grpc]

    eventually(back, timeout_s=40)
    eventually(lambda: clean(cluster))
    assert asyncio.run(together(cluster.grpc))[0] == undisturbed


def test_a_controller_that_was_stopped_blames_nobody(cluster, undisturbed):
    epochs = {w["id"]: w["epoch"] for w in cluster.status()["workers"]}
    os.kill(cluster.process.pid, signal.SIGSTOP)
    try:
        until = time.monotonic() + 2 * DEAD_AFTER_S
        while time.monotonic() < until:
            assert asyncio.run(together(cluster.grpc))[0] == undisturbed
    finally:
        os.kill(cluster.process.pid, signal.SIGCONT)
    until = time.monotonic() + 2 * DEAD_AFTER_S
    while time.monotonic() < until:
        assert asyncio.run(together(cluster.grpc))[0] == undisturbed
    assert {w["id"]: w["epoch"] for w in cluster.status()["workers"]} == epochs


def post(cluster: Cluster, body: bytes) -> tuple[int, dict]:
    request = urllib.request.Request(f"http://{cluster.http}/v1/completions", body, {"content-type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=60)
    with refused.value as answer:
        return answer.code, json.loads(answer.read())["error"]


def call(cluster: Cluster, body: bytes) -> grpc.RpcError:
    with grpc.insecure_channel(cluster.grpc, options=[("grpc.max_send_message_length", -1)]) as channel:
        with pytest.raises(grpc.RpcError) as refused:
            list(channel.unary_stream("/tandem.v1.Inference/Generate")(body, timeout=60))
        return refused.value


HUGE = b"a" * 100_000_000
BODIES = {
    "100 MB": (b'{"model":"demo","prompt":"' + HUGE + b'"}', 413, "max_body_bytes"),
    "not UTF-8": (b'{"model":"demo","prompt":"\xff\xfe"}', 400, "not valid JSON"),
    "half a surrogate pair": (b'{"model":"demo","prompt":"\\ud800"}', 400, "surrogate|escape"),
    "NaN": (b'{"model":"demo","prompt":"a","temperature":NaN}', 400, "not valid JSON"),
    "endless nesting": (b'{"model":"demo","prompt":' + b"[" * 200_000 + b"]" * 200_000 + b"}", 400, "recursion"),
    "numbers beyond any type": (b'{"model":"demo","prompt":"a","top_k":1152921504606846976}', 400, "top_k"),
    "negative ids": (b'{"model":"demo","prompt":[-1]}', 400, "token id -1"),
    "more than the context": (b'{"model":"demo","prompt":"a","max_tokens":100000}', 400, "lower max_tokens"),
}


def test_hostile_input_is_refused_and_harms_no_stream(cluster, undisturbed):
    async def attack(seen: Seen) -> None:
        await seen.under_way()
        for name, (body, status, says) in BODIES.items():
            code, error = await asyncio.to_thread(post, cluster, body)
            assert code == status, name
            assert error["type"] == "invalid_request_error", name
            assert any(word in error["message"] for word in says.split("|")), (name, error)
        huge = await asyncio.to_thread(call, cluster, b"\x12\x80\xc2\xd7\x2f" + HUGE)
        assert huge.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        torn = await asyncio.to_thread(call, cluster, b"\x12\x02\xff\xfe")
        assert torn.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "Traceback" not in torn.details()

    tokens, ends = asyncio.run(together(cluster.grpc, attack))
    assert tokens == undisturbed, ends
    eventually(lambda: clean(cluster))
