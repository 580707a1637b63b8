"""A whole cluster in one process and one loop: the real controller, workers and router, so that `loopback` can carry KV."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from cluster.controller import Controller, desired_of
from cluster.host import Ended, entry_of
from cluster.service import ClusterServicer, cluster_registration
from core.config import load
from core.hostspec import HostSpec
from core.service import serve

READY_TIMEOUT_S = 60.0


class Addresses(NamedTuple):
    grpc: str
    http: str


class _TaskHandle:
    def __init__(self, spec: HostSpec) -> None:
        self.exited: asyncio.Future[Ended] = asyncio.get_running_loop().create_future()
        self._stop = asyncio.Event()
        self._task = asyncio.create_task(self._live(spec), name=spec.worker_id)

    async def stop(self, grace_s: float) -> None:
        self._stop.set()
        await asyncio.wait({self._task}, timeout=grace_s)
        self._task.cancel()
        await asyncio.wait({self._task})

    async def _live(self, spec: HostSpec) -> None:
        reason = "stopped"
        try:
            await entry_of(spec.role)(spec, self._stop)
        except BaseException as error:
            reason = repr(error)
            raise
        finally:
            self.exited.set_result(Ended(reason, permanent=True))


class InLoopLauncher:
    async def launch(self, spec: HostSpec) -> _TaskHandle:
        return _TaskHandle(spec)

    async def close(self) -> None:
        """Every handle was stopped by the controller."""


@asynccontextmanager
async def cluster_in_loop(overrides: dict[str, Any]) -> AsyncIterator[Addresses]:
    """A cluster that can serve, until the block ends."""
    config = load(None, {"log_level": "warning", **overrides})
    controller = Controller(config, InLoopLauncher(), desired_of(config))
    servicer = ClusterServicer(controller, config.cluster.heartbeat_s, lambda: None)
    async with serve(config.cluster.admin, cluster_registration(servicer)) as server:
        controller.address = server.address
        control = asyncio.create_task(controller.run(), name="control loop")
        ready = asyncio.create_task(controller.ready.wait(), name="ready")
        try:
            await asyncio.wait({control, ready}, timeout=READY_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
            if control.done():
                control.result()
            assert controller.ready.is_set(), f"not ready after {READY_TIMEOUT_S:g} s: {controller.snapshot()}"
            (router,) = (m.report for m in controller.snapshot().members if m.report.role.value == "router")
            yield Addresses(router.grpc_address, router.http_address)
        finally:
            ready.cancel()
            control.cancel()
            await asyncio.gather(ready, control, return_exceptions=True)
            await controller.stop_all(grace_s=5.0)
