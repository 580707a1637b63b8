"""Heartbeats to the controller: one report on every change that matters and at least one per heartbeat, for ever.

The controller may die and come back, or never come: serving does not depend on it. A broken stream is opened again with
growing pauses, and its first report tells everything, so a new controller rebuilds its state from its workers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from enum import Enum

import grpc

from core.blocks import KvLayout
from core.cost_model import Fit
from core.hostspec import HostSpec
from core.inventory import BlockCounts
from core.service import KEEPALIVE_OPTIONS
from core.wire import fit_to_pb, layout_to_pb, role_to_pb
from tandem.cancelling import heed_cancellation
from tandem.v1 import cluster_pb2 as pb
from tandem.v1 import cluster_pb2_grpc

log = logging.getLogger(__name__)

BACKOFF_MIN_S = 0.1
BACKOFF_MAX_S = 5.0
NO_BLOCKS = BlockCounts(0, 0, 0, 0)


class WorkerState(Enum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    DEAD = "dead"


_STATE = {
    WorkerState.STARTING: pb.WORKER_STATE_STARTING,
    WorkerState.READY: pb.WORKER_STATE_READY,
    WorkerState.DRAINING: pb.WORKER_STATE_DRAINING,
    WorkerState.DEAD: pb.WORKER_STATE_DEAD,
}


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a router needs to know of the model that is served."""

    name: str
    path: str
    max_model_len: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class Facts:
    """A worker at one moment, as it is reported."""

    state: WorkerState = WorkerState.STARTING
    grpc_address: str = ""
    metrics_address: str = ""
    http_address: str = ""
    host_id: str = ""
    blocks: BlockCounts = NO_BLOCKS
    leases_open: int = 0
    running: int = 0
    waiting: int = 0
    waiting_tokens: int = 0
    context_tokens: int = 0
    step_cost: Fit | None = None
    layout: KvLayout | None = None
    model: ModelFacts | None = None
    progress: float = 0.0
    detail: str = ""


class Reporter:
    """Reports what `facts()` says, until cancelled. `changed()` sends a report now instead of at the next heartbeat.

    `on_drain(deadline_s)` is called once per order to drain, on the asyncio thread.
    """

    def __init__(self, spec: HostSpec, facts: Callable[[], Facts], on_drain: Callable[[float], None]) -> None:
        self._spec = spec
        self._facts = facts
        self._on_drain = on_drain
        self._heartbeat_s = spec.config.cluster.heartbeat_s
        self._sequence = 0
        self._changed = asyncio.Event()
        self._drain_ordered = False

    def changed(self) -> None:
        self._changed.set()

    async def run(self) -> None:
        """Connects, reports, and connects again; ends only by cancellation."""
        pause_s = BACKOFF_MIN_S
        while True:
            before = self._sequence
            try:
                await self._report()
            except grpc.aio.AioRpcError as error:
                heed_cancellation()
                log.debug("the report stream to %s broke: %s", self._spec.controller, error.details())
            pause_s = BACKOFF_MIN_S if self._sequence > before + 1 else min(pause_s * 2, BACKOFF_MAX_S)
            await asyncio.sleep(pause_s)

    async def _report(self) -> None:
        """One stream, from connecting to its end."""
        async with grpc.aio.insecure_channel(self._spec.controller, options=KEEPALIVE_OPTIONS) as channel:
            stub = cluster_pb2_grpc.ClusterStub(channel)  # type: ignore[no-untyped-call]
            call = stub.Report(self._reports())
            try:
                async for reply in call:
                    if reply.drain and not self._drain_ordered:
                        self._drain_ordered = True
                        self._on_drain(reply.drain_deadline_s)
            finally:
                call.cancel()

    async def _reports(self) -> AsyncIterator[pb.WorkerReport]:
        while True:
            self._changed.clear()
            self._sequence += 1
            yield self.message(self._facts())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._heartbeat_s):
                    await self._changed.wait()

    def message(self, facts: Facts) -> pb.WorkerReport:
        spec = self._spec
        report = pb.WorkerReport(
            worker_id=spec.worker_id,
            role=role_to_pb(spec.role),
            epoch=spec.epoch,
            sequence=self._sequence,
            state=_STATE[facts.state],
            pid=os.getpid(),
            node=spec.node,
            host_id=facts.host_id,
            grpc_address=facts.grpc_address,
            metrics_address=facts.metrics_address,
            http_address=facts.http_address,
            blocks=pb.BlockCounts(**facts.blocks._asdict()),
            leases_open=facts.leases_open,
            running=facts.running,
            waiting=facts.waiting,
            waiting_tokens=facts.waiting_tokens,
            context_tokens=facts.context_tokens,
            progress=facts.progress,
            detail=facts.detail,
        )
        if facts.layout is not None:
            report.layout.CopyFrom(layout_to_pb(facts.layout))
        if facts.step_cost is not None:
            report.step_cost.CopyFrom(fit_to_pb(facts.step_cost))
        if facts.model is not None:
            model = facts.model
            report.model.CopyFrom(
                pb.ModelInfo(name=model.name, path=model.path, max_model_len=model.max_model_len, vocab_size=model.vocab_size)
            )
        return report
