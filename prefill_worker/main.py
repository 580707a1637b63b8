"""Wires a prefill worker: the engine with the prefill role, exports of what it computed, the Prefill and Kv services."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from prometheus_client.core import Metric

from core.blocks import KvSource
from core.hostspec import HostSpec
from core.service import Registration
from engine.output import StepOutput
from kvtransfer.collective_end import open_collective
from kvtransfer.exports import Exports
from kvtransfer.handoff import ExportState
from kvtransfer.loopback import PROCESS_HUB
from kvtransfer.plane import offered, open_tcp
from kvtransfer.service import KvServicer
from prefill_worker.publish import Publisher
from prefill_worker.role import PrefillRole
from prefill_worker.service import PrefillHandler
from tandem.v1 import kv_pb2_grpc, prefill_pb2_grpc
from worker.collectors import counters, gauge
from worker.session import SessionServicer
from worker.shell import Base, WorkerInfo, WorkerKind, run_worker


class PrefillParts:
    """What makes a worker a prefill worker. While it lives, its arena can be reached from inside the process too."""

    def __init__(self, base: Base) -> None:
        spec, node = base.spec, base.node
        config = spec.config.transfer
        self._base = base
        self._exports = Exports(spec.epoch, node.arena, node.inventory, base.clock, digest=config.digest, layout=node.layout)
        self._publisher = Publisher(base.engine, base.links, self._exports)
        self._exports.on_end = self._publisher.on_export_ended
        self.handler = PrefillHandler(
            base.engine, base.links, self._exports, self._publisher, self._source, node.layout, config.lease_s, config.codec
        )
        self._tcp = open_tcp(config, self._exports, spec.listen)
        self._collective = open_collective(config, node.arena, spec.listen)
        PROCESS_HUB.register(spec.worker_id, spec.epoch, node.arena)

    def registrations(self, session: SessionServicer) -> list[Registration]:
        served = [
            Registration("tandem.v1.Prefill", prefill_pb2_grpc.add_PrefillServicer_to_server, session),
            Registration("tandem.v1.Kv", kv_pb2_grpc.add_KvServicer_to_server, KvServicer(self._exports)),
        ]
        return served if self._collective is None else [*served, self._collective.registration(self._exports)]

    def on_step(self, output: StepOutput, started: float) -> None:
        self._publisher.on_step(output, started)

    def tick(self) -> None:
        self._exports.expire(self._base.clock.now())

    def pending(self) -> int:
        return 0  # what waits for its puller shows as a lease

    def collect(self) -> Iterable[Metric]:
        yield gauge("tandem_kv_exports_open", "Hand-offs on offer to decode workers.", len(self._exports))
        ended = [((state.value,), self._exports.ended[state]) for state in _ENDED]
        yield counters("tandem_kv_exports_total", "Hand-offs by how they ended here.", ("state",), ended)

    async def close(self) -> None:
        PROCESS_HUB.unregister(self._base.spec.worker_id, self._base.spec.epoch)
        if self._tcp is not None:
            await asyncio.to_thread(self._tcp.close)
        if self._collective is not None:
            await self._collective.close()
        await self._exports.close()

    def _source(self) -> KvSource:
        spec, arena = self._base.spec, self._base.node.arena
        tcp_address = self._tcp.address if self._tcp is not None else ""
        return KvSource(
            worker_id=spec.worker_id,
            epoch=spec.epoch,
            grpc_address=self._base.grpc_address(),
            host_id=self._base.host_id,
            arena_path=arena.path,
            num_blocks=arena.num_blocks,
            transports=offered(arena, tcp_address, collective=self._collective is not None),
            tcp_address=tcp_address,
        )


_ENDED = (ExportState.DONE, ExportState.EXPIRED, ExportState.REVOKED)
KIND = WorkerKind(role=lambda config: PrefillRole(config.transfer.lease_s), assemble=PrefillParts)


async def run(spec: HostSpec, stop: asyncio.Event, on_ready: Callable[[WorkerInfo], None] | None = None) -> None:
    """Runs a prefill worker until `stop` is set; see `worker.shell.run_worker`."""
    await run_worker(spec, stop, KIND, on_ready)
