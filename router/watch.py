"""Follows the controller's snapshots. When the controller is gone the last snapshot stands and serving goes on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import grpc

from core.errors import InvalidRequestError
from core.report import ModelFacts, WorkerReport
from core.report_wire import report_from_pb
from core.service import KEEPALIVE_OPTIONS
from core.wire import role_from_pb
from router.view import ClusterView, WorkerView
from tandem.cancelling import heed_cancellation
from tandem.v1 import cluster_pb2 as pb
from tandem.v1.cluster_pb2_grpc import ClusterStub

log = logging.getLogger(__name__)

BACKOFF_MIN_S = 0.1
BACKOFF_MAX_S = 2.0
SILENCE_MAX_S = 10.0
"""A controller sends a snapshot per heartbeat; one that is silent for so long is dialled again."""


def view_from_pb(message: pb.ClusterSnapshot) -> ClusterView:
    """A worker whose report is of another version than ours (unknown role or state) is left out, and logged."""
    workers: dict[str, WorkerView] = {}
    for report, age_s in zip(message.workers, message.ages_s, strict=True):
        try:
            workers[report.worker_id] = worker_view(report_from_pb(report), age_s)
        except InvalidRequestError as error:
            log.warning("worker %s is left out: %s", report.worker_id, error)
    return ClusterView(message.version, MappingProxyType(workers))


def worker_view(report: WorkerReport, age_s: float) -> WorkerView:
    blocks, model = report.blocks, report.model or ModelFacts()
    return WorkerView(
        worker_id=report.worker_id,
        role=report.role,
        epoch=report.epoch,
        state=report.state,
        address=report.grpc_address,
        running=report.running,
        waiting=report.waiting,
        waiting_tokens=report.waiting_tokens,
        context_tokens=report.context_tokens,
        step_cost=report.step_cost.cost if report.step_cost is not None else None,
        blocks_total=blocks.total,
        blocks_free=blocks.free,
        blocks_cached=blocks.cached,
        age_s=age_s,
        layout=report.layout,
        model_name=model.name,
        model_path=model.path,
        max_model_len=model.max_model_len,
        vocab_size=model.vocab_size,
        sequence=report.sequence,
    )


class Watch:
    """`latest` is the last snapshot as it came, for `GetStatus`; `on_view` hears of each one."""

    def __init__(self, controller: str, router_id: str, on_view: Callable[[ClusterView], None]) -> None:
        self.latest = pb.ClusterSnapshot()
        self.connected = False
        self._received_at = 0.0
        self._controller = controller
        self._request = pb.WatchRequest(watcher_id=router_id)
        self._on_view = on_view

    async def run(self) -> None:
        """Until cancelled."""
        pause_s = BACKOFF_MIN_S
        while True:
            try:
                await self._follow()
            except (grpc.aio.AioRpcError, TimeoutError) as error:
                reason = error.details() if isinstance(error, grpc.aio.AioRpcError) else "it is silent"
                log.log(logging.WARNING if self.connected else logging.DEBUG, "controller %s: %s", self._controller, reason)
            except Exception:
                log.exception("a snapshot of controller %s could not be followed", self._controller)
            heed_cancellation()
            pause_s = BACKOFF_MIN_S if self.connected else min(pause_s * 2, BACKOFF_MAX_S)
            self.connected = False
            await asyncio.sleep(pause_s)

    def status(self) -> pb.ClusterSnapshot:
        """The last snapshot with the ages of now."""
        older_s = asyncio.get_running_loop().time() - self._received_at
        snapshot = pb.ClusterSnapshot()
        snapshot.CopyFrom(self.latest)
        snapshot.ages_s[:] = [age_s + older_s for age_s in self.latest.ages_s]
        return snapshot

    def scrape_targets(self) -> list[dict[str, Any]]:
        """Where the metrics of every living process are, for Prometheus' HTTP service discovery."""
        return [
            {
                "targets": [report.metrics_address],
                "labels": {"worker_id": report.worker_id, "role": role_from_pb(report.role).value, "node": report.node},
            }
            for report in self.latest.workers
            if report.metrics_address and report.state != pb.WORKER_STATE_DEAD
        ]

    async def _follow(self) -> None:
        async with grpc.aio.insecure_channel(self._controller, options=KEEPALIVE_OPTIONS) as channel:
            stub: ClusterStub = ClusterStub(channel)  # type: ignore[no-untyped-call]
            call = stub.Watch(self._request)
            try:
                snapshots = aiter(call)
                while True:
                    async with asyncio.timeout(SILENCE_MAX_S):
                        snapshot = await anext(snapshots, None)
                    if snapshot is None:
                        return
                    self._took(snapshot)
            finally:
                call.cancel()

    def _took(self, snapshot: pb.ClusterSnapshot) -> None:
        if not self.connected:
            log.info("following controller %s", self._controller)
        self.connected = True
        self.latest = snapshot
        self._received_at = asyncio.get_running_loop().time()
        self._on_view(view_from_pb(snapshot))
