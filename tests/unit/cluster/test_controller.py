"""The controller with its service, the local launcher and real processes that hold no model."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.controller import Controller, desired_of
from cluster.launcher import LocalLauncher
from cluster.report import ClusterSnapshot
from cluster.scaling import Scaling
from cluster.service import ClusterServicer, cluster_registration
from cluster.wire import snapshot_from_pb
from core.config import load
from core.errors import ConfigError
from core.report import RoleProposal, WorkerReport, WorkerState
from core.report_wire import report_to_pb
from core.request import WorkerRole
from core.service import serve
from tandem.v1 import cluster_pb2 as pb
from tandem.v1 import cluster_pb2_grpc as stubs
from tandem.v1 import common_pb2

HOST = Path(__file__).with_name("trivial_host.py")
DEADLINE_S = 30.0


@dataclass
class Running:
    controller: Controller
    stub: Any
    control: asyncio.Task[None]
    down: asyncio.Event = field(default_factory=asyncio.Event)

    async def until(self, true: Callable[[ClusterSnapshot], object]) -> ClusterSnapshot:
        """Follows Watch, as a router does."""
        async with asyncio.timeout(DEADLINE_S):
            async for message in self.stub.Watch(pb.WatchRequest(watcher_id="test")):
                if true(snapshot := snapshot_from_pb(message)):
                    return snapshot
        raise AssertionError("the watch ended")


@asynccontextmanager
async def cluster(**overrides: Any) -> AsyncIterator[Running]:
    defaults = {"cluster.heartbeat_s": 0.1, "cluster.dead_after_s": 20.0, "cluster.grace_s": 4.0, "store.nodes": 0}
    config = load(overrides=defaults | {name.replace("__", "."): value for name, value in overrides.items()})
    launcher = LocalLauncher((sys.executable, str(HOST)))
    controller, down = Controller(config, launcher, desired_of(config)), asyncio.Event()
    servicer = ClusterServicer(controller, config.cluster.heartbeat_s, down.set)
    async with (
        serve("127.0.0.1:0", cluster_registration(servicer), grace_s=0.1) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        controller.address = server.address
        control = asyncio.create_task(controller.run())
        try:
            yield Running(controller, stubs.ClusterStub(channel), control, down)  # type: ignore[no-untyped-call]
        finally:
            control.cancel()
            await asyncio.gather(control, return_exceptions=True)
            await controller.stop_all(4.0)
            await launcher.close()


def ready(snapshot: ClusterSnapshot) -> set[str]:
    return {m.report.worker_id for m in snapshot.members if m.report.state is WorkerState.READY}


def report_of(snapshot: ClusterSnapshot, worker_id: str) -> WorkerReport:
    report = snapshot.find(worker_id)
    assert report is not None
    return report


def files(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


async def test_a_killed_worker_is_replaced_with_a_higher_epoch_and_the_router_keeps_its_port() -> None:
    async with cluster() as running:
        snapshot = await running.until(lambda s: ready(s) == {"router-0", "prefill-0", "decode-0"})
        assert running.controller.ready.is_set()
        gone: list[tuple[str, int]] = []
        running.controller.gone = lambda *name: gone.append(name)
        os.kill(report_of(snapshot, "decode-0").pid, signal.SIGKILL)
        snapshot = await running.until(lambda s: report_of(s, "decode-0").epoch == 2 and "decode-0" in ready(s))
        assert gone == [("decode-0", 1)]
        router = report_of(snapshot, "router-0")
        assert router.grpc_address == "127.0.0.1:40001"
        spec = running.controller._spec("router-0", WorkerRole.ROUTER, 2)
        assert (spec.config.router.grpc, spec.config.router.http) == (router.grpc_address, router.http_address)
        ghost = WorkerReport("decode-0", WorkerRole.DECODE, 1, 999, WorkerState.READY)
        call = running.stub.Report(iter([report_to_pb(ghost)]))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call.read()
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION, "the old incarnation still speaks"
        assert "epoch" in (refused.value.details() or "")


async def test_a_silent_worker_is_killed_and_replaced() -> None:
    async with cluster(cluster__dead_after_s=2.0) as running:
        snapshot = await running.until(lambda s: len(ready(s)) == 3)
        os.kill(report_of(snapshot, "prefill-0").pid, signal.SIGSTOP)
        await running.until(lambda s: report_of(s, "prefill-0").epoch == 2 and "prefill-0" in ready(s))
        with pytest.raises(ProcessLookupError):
            os.kill(report_of(snapshot, "prefill-0").pid, 0)


async def test_a_worker_takes_the_role_that_an_operator_gives_it() -> None:
    async with cluster(cluster__prefill=2) as running:
        await running.until(lambda s: len(ready(s)) == 4)
        request = pb.SetRoleRequest(target="prefill-1", role=common_pb2.WORKER_ROLE_DECODE)
        answer = await running.stub.SetRole(request)
        assert answer.found
        assert "keeps what it holds" in answer.detail
        snapshot = await running.until(lambda s: report_of(s, "prefill-1").role is WorkerRole.DECODE)
        assert (report_of(snapshot, "prefill-1").epoch, len(ready(snapshot))) == (1, 4), "nobody was replaced"
        assert "already" in (await running.stub.SetRole(request)).detail
        assert not (await running.stub.SetRole(pb.SetRoleRequest(target="nobody", role=2))).found
        for target, role in (("prefill-0", common_pb2.WORKER_ROLE_DECODE), ("prefill-0", 0), ("router-0", 2)):
            with pytest.raises(grpc.aio.AioRpcError):
                await running.stub.SetRole(pb.SetRoleRequest(target=target, role=role))


@pytest.mark.parametrize(("obeys", "plays"), [("auto", WorkerRole.DECODE), ("off", WorkerRole.PREFILL)])
async def test_a_router_proposes_roles_and_the_controller_decides(obeys: str, plays: WorkerRole) -> None:
    async with cluster(cluster__prefill=2, cluster__role_changes=obeys, model__name="propose:prefill-1") as running:
        snapshot = await running.until(
            lambda s: len(ready(s)) == 4 and report_of(s, "router-0").proposal and report_of(s, "router-0").sequence > 5
        )
        snapshot = await running.until(lambda s: report_of(s, "prefill-1").role is plays)
        assert report_of(snapshot, "prefill-1").epoch == 1
        assert report_of(snapshot, "router-0").proposal == RoleProposal("prefill-1", WorkerRole.DECODE, "a test")


def test_routers_share_an_address_or_count_up_from_it() -> None:
    def listens(number: int, **router: object) -> tuple[str, str]:
        config = load(overrides={"cluster.routers": 3, **{f"router.{name}": value for name, value in router.items()}})
        made = Controller(config, LocalLauncher(), desired_of(config))._spec(f"router-{number}", WorkerRole.ROUTER, 1)
        return made.config.router.grpc, made.config.router.http

    at = {"grpc": "0.0.0.0:7000", "http": "[::]:8000"}
    assert listens(2, **at) == ("0.0.0.0:7000", "[::]:8000")
    assert listens(2, share_address=False, **at) == ("0.0.0.0:7002", "[::]:8002")
    assert listens(2, share_address=False) == ("127.0.0.1:0", "127.0.0.1:0")


async def test_an_operator_drains_a_worker_and_ends_the_cluster() -> None:
    async with cluster() as running:
        await running.until(lambda s: len(ready(s)) == 3)
        with pytest.raises(grpc.aio.AioRpcError, match="tandem down"):
            await running.stub.Drain(pb.DrainRequest(target="router-0", deadline_s=1.0))
        unknown = await running.stub.Drain(pb.DrainRequest(target="prefill-7", deadline_s=1.0))
        assert not unknown.found
        assert "no worker prefill-7" in unknown.detail
        answer = await running.stub.Drain(pb.DrainRequest(target="decode-0", deadline_s=0.5))
        assert answer.found
        snapshot = await running.until(lambda s: "decode-1" in ready(s) and s.find("decode-0") is None)
        assert ready(snapshot) == {"router-0", "prefill-0", "decode-1"}
        await running.stub.Shutdown(pb.ShutdownRequest())
        assert running.down.is_set()


async def test_a_mistake_of_the_operator_ends_the_start_at_once_with_its_reason() -> None:
    async with cluster(model__name="fail") as running:
        with pytest.raises(ConfigError, match="could not start: there is no model at /nowhere"):
            async with asyncio.timeout(DEADLINE_S):
                await running.control


async def test_a_worker_that_always_crashes_ends_the_start_after_some_attempts() -> None:
    async with cluster(model__name="crash") as running:
        with pytest.raises(ConfigError, match="could not start: ZeroDivisionError: a bug"):
            async with asyncio.timeout(DEADLINE_S):
                await running.control
        assert max(m.report.epoch for m in running.controller.snapshot().members) == 3


async def test_ending_leaves_no_process_and_no_file(tmp_path: Path) -> None:
    async with cluster(model__name=f"shm:{tmp_path}/kv") as running:
        snapshot = await running.until(lambda s: len(ready(s)) == 3)
        assert len(files(tmp_path)) == 3
        pids = [m.report.pid for m in snapshot.members]
    assert files(tmp_path) == []
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        ({"cluster.prefill": 1, "cluster.decode": 0}, "split pools need both"),
        ({"cluster.prefill": 0, "cluster.decode": 0}, "there is no worker"),
    ],
)
def test_pools_that_cannot_serve_are_refused(overrides: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        desired_of(load(overrides=overrides))


async def test_load_makes_the_controller_add_a_process_and_quiet_ends_it(tmp_path: Path) -> None:
    waiting = tmp_path / "waiting"
    waiting.write_text("0")
    pools = {"cluster__prefill": 0, "cluster__decode": 0, "cluster__colocated": 1}
    scaling = {"cluster__autoscale": "auto", "cluster__autoscale_max": 2, "cluster__autoscale_quiet_s": 1.0}
    async with cluster(**pools, **scaling, model__name=f"load:{waiting}") as running:
        await running.until(lambda s: ready(s) == {"router-0", "colocated-0"})
        waiting.write_text("50")
        snapshot = await running.until(lambda s: ready(s) == {"router-0", "colocated-0", "colocated-1"})
        pid = next(m.report.pid for m in snapshot.members if m.report.worker_id == "colocated-1")
        os.kill(pid, 0)
        waiting.write_text("0")
        await running.until(lambda s: ready(s) == {"router-0", "colocated-0"})
        await running.until(lambda s: len(s.members) == 2)
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


async def test_a_plan_that_fails_ends_scaling_and_not_the_cluster(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_plan(*_: object) -> list[object]:
        raise ZeroDivisionError("float division by zero")

    monkeypatch.setattr(Scaling, "decide", no_plan)
    async with cluster(cluster__autoscale="auto") as running:
        await running.until(lambda s: ready(s) == {"router-0", "prefill-0", "decode-0"})
        async with asyncio.timeout(DEADLINE_S):
            while running.controller._scaling is not None:
                await running.stub.GetStatus(pb.GetStatusRequest())
        assert not running.control.done()
    assert caplog.text.count("not scaled any more") == 1
