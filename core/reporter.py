"""Reports to the controller: soon after whatever changed, and at least one per heartbeat, for ever.

The controller may die and come back, or never come: serving does not depend on it. A broken stream is opened again with
growing pauses, and its first report tells everything, so a new controller rebuilds its state from its workers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import grpc

from core.hostspec import HostSpec
from core.report import WorkerReport
from core.report_wire import report_to_pb
from core.request import WorkerRole
from core.service import KEEPALIVE_OPTIONS
from core.wire import role_from_pb
from tandem.cancelling import heed_cancellation
from tandem.v1 import cluster_pb2 as pb
from tandem.v1 import cluster_pb2_grpc

log = logging.getLogger(__name__)

BACKOFF_MIN_S = 0.1
BACKOFF_MAX_S = 5.0
LOOK_S = 0.5
"""How often it is seen whether anything changed. A message costs two processes far more than a look."""


def first_report(spec: HostSpec) -> WorkerReport:
    """Of this process, which starts as `spec`."""
    return WorkerReport(spec.worker_id, spec.role, spec.epoch, node=spec.node, pid=os.getpid())


class Reporter:
    """Reports what `report()` says, numbered, until cancelled. `changed()` has it looked at now instead of a little later.

    `on_drain(deadline_s)` is called once per order to drain, `on_role(role)` until the reports name that role; on the
    asyncio thread.
    """

    def __init__(
        self,
        spec: HostSpec,
        report: Callable[[], WorkerReport],
        on_drain: Callable[[float], None],
        on_role: Callable[[WorkerRole], None] = lambda role: None,
    ) -> None:
        self._spec = spec
        self._now = report
        self._on_drain = on_drain
        self._on_role = on_role
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
                    if reply.role:
                        self._on_role(role_from_pb(reply.role))
            finally:
                call.cancel()

    async def _reports(self) -> AsyncIterator[pb.WorkerReport]:
        said, looks = None, 0
        every_s = min(LOOK_S, self._heartbeat_s)
        while True:
            self._changed.clear()
            report, looks = self._now(), looks - 1
            if report != said or looks <= 0:
                said, looks = report, round(self._heartbeat_s / every_s)
                self._sequence += 1
                yield report_to_pb(replace(report, sequence=self._sequence))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(every_s):
                    await self._changed.wait()
