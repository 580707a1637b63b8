"""The whole router as a host runs it: controller, workers, both fronts, readiness, the end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from scripted_worker import Exchange, ScriptedWorker, expected

from core.config import load
from core.errors import ConfigError
from core.hostspec import HostSpec
from core.request import WorkerRole
from core.service import Registration, serve
from router.main import RouterInfo, run
from tandem import AsyncClient, SamplingParams, UnavailableError
from tandem.v1 import cluster_pb2, cluster_pb2_grpc

PROMPT = tuple(range(40, 60))
PARAMS = SamplingParams(max_tokens=16, seed=7, ignore_eos=True)


class ScriptedController(cluster_pb2_grpc.ClusterServicer):
    """Sends what `announce` was told; keeps what was reported."""

    def __init__(self) -> None:
        self.workers: list[ScriptedWorker] = []
        self.reports: list[cluster_pb2.WorkerReport] = []
        self.changed = asyncio.Condition()
        self.version = 0

    async def announce(self, *workers: ScriptedWorker) -> None:
        async with self.changed:
            self.workers, self.version = list(workers), self.version + 1
            self.changed.notify_all()

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[cluster_pb2.ClusterSnapshot]:
        sent = -1
        while True:
            async with self.changed:
                await self.changed.wait_for(lambda: self.version != sent)  # noqa: B023
            sent = self.version
            reports = [worker.report() for worker in self.workers]
            yield cluster_pb2.ClusterSnapshot(version=sent, workers=reports, ages_s=[0.0] * len(reports), model="m")

    async def Report(self, requests: Any, context: Any) -> AsyncIterator[cluster_pb2.ReportReply]:
        async for report in requests:
            async with self.changed:
                self.reports.append(report)
                self.changed.notify_all()
            yield cluster_pb2.ReportReply()

    async def reported(self, state: int) -> None:
        async with asyncio.timeout(10), self.changed:
            await self.changed.wait_for(lambda: any(r.state == state for r in self.reports))


class Running:
    def __init__(self, controller: ScriptedController, stop: asyncio.Event, task: asyncio.Task[None]) -> None:
        self.controller, self.stop, self.task = controller, stop, task
        self.info: RouterInfo
        self.workers: list[ScriptedWorker] = []


def spec(controller: str, **overrides: object) -> HostSpec:
    config = load(None, {"cluster.grace_s": 2.0, "cluster.heartbeat_s": 0.1, **overrides})
    return HostSpec("router-0", WorkerRole.ROUTER, 1, config, controller)


@contextlib.asynccontextmanager
async def running(**overrides: object) -> AsyncIterator[Running]:
    controller, exchange, stop = ScriptedController(), Exchange(), asyncio.Event()
    registration = Registration("tandem.v1.Cluster", cluster_pb2_grpc.add_ClusterServicer_to_server, controller)
    ready: asyncio.Future[RouterInfo] = asyncio.get_running_loop().create_future()
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(serve("127.0.0.1:0", registration, grace_s=0))
        task = asyncio.create_task(run(spec(server.address, **overrides), stop, ready.set_result), name="router")
        router = Running(controller, stop, task)
        router.workers = [
            ScriptedWorker("prefill-0", WorkerRole.PREFILL, exchange),
            ScriptedWorker("decode-0", WorkerRole.DECODE, exchange),
        ]
        for worker in router.workers:
            await worker.start()
        await controller.announce(*router.workers)
        async with asyncio.timeout(20):
            router.info = await ready
        try:
            yield router
        finally:
            stop.set()
            async with asyncio.timeout(10):
                await task
            for worker in router.workers:
                if not worker.dead:
                    await worker.die()


async def test_both_fronts_serve_and_everything_ends():
    async with running() as router:
        async with AsyncClient(router.info.grpc_address) as client:
            result = await client.generate(list(PROMPT), PARAMS)
            assert list(result.token_ids) == expected(PROMPT, 7, 16)
        async with httpx.AsyncClient(base_url=f"http://{router.info.http_address}") as http:
            assert (await http.get("/ready")).status_code == 200
            body = {"model": "scripted", "prompt": list(PROMPT), "max_tokens": 16, "seed": 7}
            reply = await http.post("/v1/completions", json=body)
            assert reply.status_code == 200, reply.text
            assert reply.json()["usage"]["completion_tokens"] == 16
            metrics = (await http.get("/metrics")).text
            assert 'tandem_router_requests_total{outcome="completed"} 2.0' in metrics
            assert 'tandem_router_workers_connected{role="decode"} 1.0' in metrics
        await router.controller.reported(cluster_pb2.WORKER_STATE_READY)
        ready = next(r for r in router.controller.reports if r.state == cluster_pb2.WORKER_STATE_READY)
        assert (ready.grpc_address, ready.http_address) == (router.info.grpc_address, router.info.http_address)
        router.stop.set()
        await router.task
        assert not any(worker.held for worker in router.workers)


async def test_health_and_status_follow_the_workers():
    async with running() as router, grpc.aio.insecure_channel(router.info.grpc_address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        watching = health.Watch(health_pb2.HealthCheckRequest())
        states = aiter(watching)
        assert (await anext(states)).status == health_pb2.HealthCheckResponse.SERVING
        status = await cluster_pb2_grpc.ClusterStub(channel).GetStatus(cluster_pb2.GetStatusRequest())
        assert [worker.worker_id for worker in status.workers] == ["prefill-0", "decode-0"]
        await router.workers[1].die()
        await router.controller.announce(*router.workers)
        async with asyncio.timeout(10):
            assert (await anext(states)).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watching.cancel()


async def test_serving_goes_on_without_the_controller_and_with_a_new_one_that_knows_nobody():
    async with running() as router, AsyncClient(router.info.grpc_address) as client:
        await router.controller.announce()
        for seed in range(3):
            result = await client.generate(list(PROMPT), SamplingParams(max_tokens=8, seed=seed, ignore_eos=True))
            assert list(result.token_ids) == expected(PROMPT, seed, 8)


async def test_stopping_lets_requests_finish_and_refuses_new_ones():
    async with running() as router, AsyncClient(router.info.grpc_address, max_retries=0) as client:
        decode = router.workers[1]
        hold = asyncio.Event()
        decode.hook = lambda stage, key: hold.wait() if stage == "token" else None
        under_way = asyncio.create_task(client.generate(list(PROMPT), PARAMS))
        await decode.until(lambda: bool(decode.held))
        router.stop.set()
        await router.controller.reported(cluster_pb2.WORKER_STATE_DRAINING)
        with pytest.raises(UnavailableError):
            await client.generate(list(PROMPT), PARAMS)
        hold.set()
        assert list((await under_way).token_ids) == expected(PROMPT, 7, 16)


async def test_what_does_not_finish_in_time_is_cancelled_on_the_workers():
    async with running(**{"cluster.grace_s": 0.5}) as router, AsyncClient(router.info.grpc_address, max_retries=0) as client:
        decode = router.workers[1]
        never = asyncio.Event()
        decode.hook = lambda stage, key: never.wait() if stage == "token" else None
        under_way = asyncio.create_task(client.generate(list(PROMPT), PARAMS))
        await decode.until(lambda: bool(decode.held))
        router.stop.set()
        await decode.until(lambda: not decode.held)
        await asyncio.gather(under_way, return_exceptions=True)
        await router.task


@pytest.mark.parametrize("name", ["router.grpc", "router.http"])
async def test_an_address_in_use_is_a_configuration_error(name: str):
    async with serve("127.0.0.1:0") as taken:
        with pytest.raises((ConfigError, ExceptionGroup)) as caught:
            await run(spec("127.0.0.1:1", **{name: taken.address}), asyncio.Event())
        error = caught.value
        while isinstance(error, ExceptionGroup):
            error = error.exceptions[0]
        assert isinstance(error, ConfigError)
        assert taken.address in str(error)


async def test_an_unknown_policy_names_the_known_ones():
    with pytest.raises(ConfigError, match="least_load"):
        await run(spec("127.0.0.1:1", **{"router.policy": "nonsense"}), asyncio.Event())
