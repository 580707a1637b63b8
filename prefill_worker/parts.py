"""Wires a prefill worker: the engine with the prefill role, exports of what it computed, the Prefill and Kv services."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from prometheus_client.core import Metric

from core.hostspec import HostSpec
from core.service import Registration
from engine.output import StepOutput
from kvtransfer.handoff import ExportState
from prefill_worker.publish import Publisher
from prefill_worker.role import PrefillRole
from prefill_worker.service import PrefillHandler
from tandem.v1 import prefill_pb2_grpc
from worker.collectors import counters, gauge
from worker.kv_plane import KvPlane
from worker.session import SessionServicer
from worker.shell import Base, WorkerInfo, WorkerKind, run_worker


class PrefillParts:
    """What makes a worker a prefill worker: hand-offs of the prompts it computed."""

    def __init__(self, base: Base) -> None:
        spec, node = base.spec, base.node
        config = spec.config.transfer
        self._kv = KvPlane(base)
        self._publisher = Publisher(base.engine, base.links, self._kv.exports)
        self._kv.exports.on_end = self._publisher.on_export_ended
        self.handler = PrefillHandler(
            base.engine, base.links, self._kv, self._publisher, node.layout, config.lease_s, config.codec
        )

    def registrations(self, session: SessionServicer) -> list[Registration]:
        mine = Registration("tandem.v1.Prefill", prefill_pb2_grpc.add_PrefillServicer_to_server, session)
        return [mine, *self._kv.registrations()]

    def started(self) -> None:
        self._kv.started()

    def on_step(self, output: StepOutput, started: float) -> None:
        self._publisher.on_step(output, started)
        self._kv.on_step(output)

    def tick(self) -> None:
        self._kv.tick()

    def pending(self) -> int:
        return len(self._kv.arrivals)  # what waits for its puller shows as a lease

    def collect(self) -> Iterable[Metric]:
        exports = self._kv.exports
        yield gauge("tandem_kv_exports_open", "Hand-offs on offer to decode workers.", len(exports))
        ended = [((state.value,), exports.ended[state]) for state in _ENDED]
        yield counters("tandem_kv_exports_total", "Hand-offs by how they ended here.", ("state",), ended)
        yield from self._kv.collect()

    async def close(self) -> None:
        await self._kv.close()


_ENDED = (ExportState.DONE, ExportState.EXPIRED, ExportState.REVOKED)
KIND = WorkerKind(role=lambda config: PrefillRole(config.transfer.lease_s), assemble=PrefillParts)


async def run(spec: HostSpec, stop: asyncio.Event, on_ready: Callable[[WorkerInfo], None] | None = None) -> None:
    """Runs a prefill worker until `stop` is set; see `worker.shell.run_worker`."""
    await run_worker(spec, stop, KIND, on_ready)
