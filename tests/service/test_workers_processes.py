"""Prefill and decode as real processes: they report, hand over, die, drain and leave nothing behind."""

import asyncio
import contextlib
import glob
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tiny_llama import tiny_llama
from worker_harness import DEADLINE_S, EPOCH, Link, TestRouter, again, connected, item, running

from core.config import load
from core.hostspec import HostSpec
from core.request import WorkerRole
from core.service import Registration, serve
from core.wire import item_to_pb
from tandem.v1 import cluster_pb2 as cluster
from tandem.v1 import cluster_pb2_grpc
from tandem.v1 import common_pb2 as pb

pytestmark = [pytest.mark.service, pytest.mark.timeout(180)]
PREFILL, DECODE, COLOCATED = WorkerRole.PREFILL, WorkerRole.DECODE, WorkerRole.COLOCATED
START_S = 60.0


class Listening(cluster_pb2_grpc.ClusterServicer):
    """The controller's ear: the newest report of every worker, and orders to drain."""

    def __init__(self) -> None:
        self.reports: dict[str, cluster.WorkerReport] = {}
        self.draining: set[str] = set()
        self.streams = 0
        self._changed = asyncio.Condition()

    async def Report(self, requests, context):
        self.streams += 1
        async for report in requests:
            async with self._changed:
                newest = self.reports.get(report.worker_id)
                assert newest is None or newest.epoch != report.epoch or newest.sequence < report.sequence
                self.reports[report.worker_id] = report
                self._changed.notify_all()
            drain = report.worker_id in self.draining
            yield cluster.ReportReply(drain=drain, drain_deadline_s=10.0 if drain else 0.0)

    async def until(self, worker_id: str, check, timeout_s: float = DEADLINE_S) -> cluster.WorkerReport:
        async with asyncio.timeout(timeout_s), self._changed:
            await self._changed.wait_for(lambda: worker_id in self.reports and check(self.reports[worker_id]))
            return self.reports[worker_id]


@contextlib.asynccontextmanager
async def listening(address: str = "127.0.0.1:0") -> AsyncIterator[tuple[Listening, str]]:
    ear = Listening()
    registration = Registration("tandem.v1.Cluster", cluster_pb2_grpc.add_ClusterServicer_to_server, ear)
    async with serve(address, registration, grace_s=0.1) as server:
        yield ear, server.address


@contextlib.asynccontextmanager
async def process(
    role: WorkerRole, controller: str, shm_dir: Path, epoch: int = EPOCH
) -> AsyncIterator[asyncio.subprocess.Process]:
    settings = {
        "model.path": tiny_llama(),
        "engine.max_step_tokens": 32,
        "engine.kv_bytes": 2**20,
        "cluster.grace_s": 4.0,
        "cluster.heartbeat_s": 0.1,
        "transfer.shm_dir": str(shm_dir),
    }
    spec = HostSpec(role.value, role, epoch, load(overrides=settings), controller)
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "cluster.host", str(os.getpid()), stdin=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    try:
        assert child.stdin is not None
        child.stdin.write(spec.to_json().encode() + b"\n")
        await child.stdin.drain()
        child.stdin.close()
        yield child
    finally:
        if child.returncode is None:
            child.kill()
        await child.wait()


async def dialled(role: WorkerRole, report: cluster.WorkerReport) -> Link:
    link = Link()
    await link.open(role, report.grpc_address)
    return link


def is_ready(report: cluster.WorkerReport) -> bool:
    return report.state == cluster.WORKER_STATE_READY


async def test_two_processes_hand_over_die_drain_and_leave_nothing(tmp_path):
    items = [item("greedy", 100), item("seeded", 70, temperature=0.9, seed=3), item("short", 5)]
    async with running(COLOCATED) as worker, connected(worker) as router:
        expected = [await router.local(one) for one in items]

    async with (
        listening() as (ear, controller),
        process(PREFILL, controller, tmp_path) as prefill,
        process(DECODE, controller, tmp_path) as decode,
    ):
        told = {role: await ear.until(role.value, is_ready, START_S) for role in (PREFILL, DECODE)}
        assert told[PREFILL].pid == prefill.pid
        assert told[PREFILL].host_id == told[DECODE].host_id != ""
        assert told[DECODE].model.vocab_size == 512
        assert told[PREFILL].layout == told[DECODE].layout
        router = TestRouter(await dialled(PREFILL, told[PREFILL]), await dialled(DECODE, told[DECODE]))
        assert list(await asyncio.gather(*(router.split(one) for one in items))) == expected

        # the prefill process dies in the middle of a prompt: decode notices, and goes on by itself
        doomed = item("doomed", 1500, max_tokens=5)
        assert (await router.reserve(doomed)).granted
        await router.hand_off(doomed, await router.start(doomed))
        prefill.send_signal(signal.SIGKILL)
        failed = await router.decode.expect(doomed.key, pb.AttemptFailed)
        assert failed.retryable
        await prefill.wait()
        assert len(await router.local(again(doomed, 2))) == 5
        held = await ear.until(DECODE.value, lambda report: report.blocks.active == report.running == 0)
        assert held.blocks.free + held.blocks.cached == held.blocks.total
        assert glob.glob(f"{tmp_path}/tandem-prefill-{EPOCH}-*"), "SIGKILL leaves its file to whoever comes next"

        async with process(PREFILL, controller, tmp_path, EPOCH + 1) as replacement:
            await ear.until(PREFILL.value, lambda report: is_ready(report) and report.epoch == EPOCH + 1, START_S)
            assert not glob.glob(f"{tmp_path}/tandem-prefill-{EPOCH}-*")
            replacement.send_signal(signal.SIGTERM)
            async with asyncio.timeout(DEADLINE_S):
                await replacement.wait()

        # an order to drain: what runs is finished, new attempts are refused, then SIGTERM ends it at once
        running_on = item("running on", 40, max_tokens=150)
        await router.decode.send(generate_local=pb.GenerateLocal(item=item_to_pb(running_on)))
        await router.decode.tokens(running_on.key, 1)
        ear.draining.add(DECODE.value)
        await ear.until(DECODE.value, lambda report: report.state == cluster.WORKER_STATE_DRAINING)
        assert (await router.reserve(item("late", 10))).reason == "this worker is draining"
        assert len(await router.decode.tokens(running_on.key)) == 149
        await ear.until(DECODE.value, lambda report: report.running == report.waiting == report.leases_open == 0)
        decode.send_signal(signal.SIGTERM)
        async with asyncio.timeout(DEADLINE_S):
            assert await decode.wait() == 0
        assert not glob.glob(f"{tmp_path}/*")
        for link in (router.prefill, router.decode):
            await link.close()


async def test_workers_do_not_care_whether_a_controller_is_there(tmp_path):
    async with contextlib.AsyncExitStack() as stack:
        async with listening() as (ear, controller):
            await stack.enter_async_context(process(COLOCATED, controller, tmp_path))
            told = await ear.until(COLOCATED.value, is_ready, START_S)
        link = await dialled(COLOCATED, told)
        stack.push_async_callback(link.close)
        assert len(await TestRouter(link, link).local(item("meanwhile", 30))) == 12
        async with listening(controller) as (successor, _):
            again_told = await successor.until(COLOCATED.value, is_ready)
        assert again_told.grpc_address == told.grpc_address
        assert again_told.sequence > told.sequence
        assert again_told.HasField("layout"), "the first report tells everything"
