"""Two routers behind one address: both serve, a call about the other's request arrives, one dies and is replaced."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
import urllib.request
from collections.abc import AsyncIterator

import grpc
import pytest
from cluster_up import TANDEM, Cluster, eventually, tandem_up

from cli.redis_server import redis_server
from tandem import AsyncClient, NotFoundError, QuotaExceededError, SamplingParams, UnavailableError
from tandem.v1 import inference_pb2, inference_pb2_grpc

pytestmark = [pytest.mark.service, pytest.mark.timeout(180)]

CONFIG = """
cluster: {routers: 2, heartbeat_s: 0.2}
router:
  tenants: {default: {}, thrifty: {tokens_per_s: 0.5, burst_tokens: 100}}
"""
LONG = SamplingParams(max_tokens=1500, seed=3, ignore_eos=True)
SHORT = SamplingParams(max_tokens=24, seed=3, ignore_eos=True)
PROMPT = "def answer(self):\n"
DEADLINE_S = 30.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with (
        redis_server() as redis,
        tandem_up(tmp_path_factory.mktemp("replicas"), "--redis", redis.url, config=CONFIG) as up,
    ):
        yield up


def router_of(request_id: str) -> str:
    """Ids that a router makes begin with its name and epoch."""
    name, _, epoch = request_id.rpartition("-")[0].rpartition(".")
    assert epoch.isdigit(), request_id
    return name


@contextlib.asynccontextmanager
async def a_client_each(cluster: Cluster) -> AsyncIterator[dict[str, AsyncClient]]:
    """Clients by the router that their connection reached: the kernel chooses, so as many are made as it takes."""
    found: dict[str, AsyncClient] = {}
    async with contextlib.AsyncExitStack() as stack, asyncio.timeout(DEADLINE_S):
        while len(found) < 2:
            client = await stack.enter_async_context(AsyncClient(cluster.grpc))
            result = await client.generate(PROMPT, SamplingParams(max_tokens=1, seed=1))
            found.setdefault(router_of(result.request_id), client)
        yield found


async def test_both_serve_at_one_address_and_each_is_listed_with_its_own_metrics(cluster):
    routers = cluster.workers("router")
    assert {r["grpc"] for r in routers} == {cluster.grpc}
    assert {r["http"] for r in routers} == {cluster.http}
    assert len({r["peer"] for r in routers}) == len({r["metrics"] for r in routers}) == 2
    async with a_client_each(cluster) as clients:
        assert clients.keys() == {r["id"] for r in routers}
        answers = [await client.generate(PROMPT, SHORT) for client in clients.values()]
    assert answers[0].token_ids == answers[1].token_ids
    assert len({answer.placement.decode for answer in answers}) == 1, "on the same workers"
    for router in routers:
        text = await asyncio.to_thread(lambda r=router: urllib.request.urlopen(f"http://{r['metrics']}/metrics").read())
        assert b'tandem_router_requests_total{outcome="completed"}' in text


@pytest.mark.parametrize("request_id", ["", "chosen-by-a-user"])
async def test_whoever_answers_a_cancel_reaches_the_request(cluster, request_id):
    async with a_client_each(cluster) as clients:
        (mine, its_client), (_, other) = clients.items()
        stream = its_client.stream(PROMPT, LONG, request_id=request_id)
        tokens = 0
        async for _ in stream:
            if not tokens:
                assert request_id or router_of(stream.request_id) == mine
                assert await other.cancel(stream.request_id)
            tokens += 1
        assert stream.result.choices[0].finish_reason == "cancelled"
        assert 0 < tokens < 1500
        assert not await other.cancel(stream.request_id), "it is over"
        assert not await other.cancel("nobody-ever-used-this")


async def test_whoever_is_asked_explains(cluster):
    async with a_client_each(cluster) as clients:
        asked, other = clients.values()
        result = await asked.generate(PROMPT, SHORT)
        assert await other.explain(result.request_id) == await asked.explain(result.request_id)
        with pytest.raises(NotFoundError):
            await other.explain("nobody-ever-used-this")


async def test_a_call_passed_on_is_not_passed_on_again(cluster):
    """Two routers that ask each other would never end."""
    peer = cluster.workers("router")[0]["peer"]
    async with grpc.aio.insecure_channel(peer) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        passed_on = (("tandem-asked-by", "router-9.1"),)
        reply = await stub.Cancel(inference_pb2.CancelRequest(request_id="x"), timeout=5, metadata=passed_on)
        assert not reply.found


async def test_the_same_id_at_both_is_two_requests_to_the_workers(cluster):
    async with a_client_each(cluster) as clients:
        answers = await asyncio.gather(*(c.generate(PROMPT, SHORT, request_id="same") for c in clients.values()))
        again = [await c.generate(PROMPT, SHORT, request_id="same") for c in clients.values()]
    assert len({answer.token_ids for answer in (*answers, *again)}) == 1
    assert len(answers[0].token_ids) == 24


async def test_a_quota_holds_over_both(cluster):
    async with a_client_each(cluster) as clients:
        one, other = clients.values()

        async def refused(client: AsyncClient) -> bool:
            try:
                await client.generate(PROMPT, SHORT, tenant="thrifty")
            except QuotaExceededError:
                return True
            return False

        async with asyncio.timeout(DEADLINE_S):
            while not await refused(one):
                pass
            while not await refused(other):  # as soon as it has heard of what the first one served
                pass
        spent = 0
        for router in cluster.workers("router"):
            url = f"http://{router['metrics']}/metrics"
            text = (await asyncio.to_thread(lambda u=url: urllib.request.urlopen(u).read())).decode()
            spent += sum(float(line.split()[-1]) for line in text.splitlines() if "quota_exceeded" in line)
        assert spent >= 2, "each of them refused"


async def test_a_drained_router_finishes_what_it_has_while_new_calls_find_another(cluster):
    async with a_client_each(cluster) as clients:
        name, client = next(iter(clients.items()))
        stream = client.stream(PROMPT, SamplingParams(max_tokens=300, seed=3, ignore_eos=True))
        await anext(stream)
        process = await asyncio.create_subprocess_exec(TANDEM, "drain", name, "--admin", cluster.admin)
        assert await process.wait() == 0
        rest = [token async for token in stream]
        assert len(rest) == 299
        async with asyncio.timeout(DEADLINE_S):  # it hears of its end with the next report
            while router_of((await client.generate(PROMPT, SHORT)).request_id) == name:
                pass
    await asyncio.to_thread(eventually, lambda: len(cluster.workers("router")) == 2, 40)


async def test_one_is_killed_and_replaced_while_the_other_goes_on(cluster):
    async with a_client_each(cluster) as clients:
        (doomed, its_client), (_, other) = clients.items()
        before = next(r for r in cluster.workers("router") if r["id"] == doomed)
        undisturbed = await other.generate(PROMPT, LONG)
        lost, kept = its_client.stream(PROMPT, LONG), other.stream(PROMPT, LONG)
        await asyncio.gather(anext(lost), anext(kept))
        os.kill(before["pid"], signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(UnavailableError, match="may be asked for again"):
            async for _ in lost:
                pass
        assert time.monotonic() - began < 10
        again = await its_client.generate(PROMPT, SHORT)  # the same client: whoever lives answers
        assert again.token_ids == undisturbed.token_ids[:24]
        async for _ in kept:
            pass
        assert kept.result.token_ids == undisturbed.token_ids
        assert kept.result.failovers == 0

    def replaced() -> bool:
        found = [r for r in cluster.workers("router") if r["id"] == doomed]
        return bool(found) and found[0]["epoch"] > before["epoch"] and found[0]["grpc"] == cluster.grpc

    await asyncio.to_thread(eventually, replaced, 40)
    async with a_client_each(cluster) as clients:
        assert doomed in clients
