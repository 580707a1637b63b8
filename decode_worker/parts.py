"""Wires a decode worker, or a colocated one: the engine with its role, the puller of hand-offs, the Decode service."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from prometheus_client.core import Metric

from core.hostspec import HostSpec
from core.request import WorkerRole
from core.service import Registration
from core.telemetry import histogram_family
from decode_worker.ingest import Ingests
from decode_worker.role import DecodeRole
from decode_worker.service import DecodeHandler
from engine.output import StepOutput
from kvtransfer.codec import LOSSY
from kvtransfer.puller import Puller
from tandem.v1 import decode_pb2_grpc
from worker.collectors import counters, gauge
from worker.colocated import ColocatedRole
from worker.kv_plane import KvPlane
from worker.session import SessionServicer
from worker.shell import Base, WorkerInfo, WorkerKind, run_worker


class DecodeParts:
    """What makes a worker a decode worker: reservations, and the pulls that fill them."""

    def __init__(self, base: Base) -> None:
        spec, node, clock = base.spec, base.node, base.clock
        config = spec.config
        self._kv = KvPlane(base)
        self._puller = Puller(
            node.layout,
            node.inventory,
            self._kv.fetcher,
            self._kv.channels,
            config.transfer,
            clock,
            puller_id=spec.worker_id,
        )
        lossy = config.transfer.codec if config.transfer.codec in LOSSY else ""
        self._ingests = Ingests(self._puller, node.inventory, node.root_key, config.engine, clock, lossy=lossy)
        self.handler = DecodeHandler(
            base.engine,
            base.links,
            self._ingests,
            self._kv,
            node.inventory,
            node.root_key,
            clock,
            config.engine.max_running,
        )
        self._ingests.bind(self.handler)

    def registrations(self, session: SessionServicer) -> list[Registration]:
        mine = Registration("tandem.v1.Decode", decode_pb2_grpc.add_DecodeServicer_to_server, session)
        return [mine, *self._kv.registrations()]

    def started(self) -> None:
        self._kv.started()

    def on_step(self, output: StepOutput, started: float) -> None:
        self.handler.on_step(output, started)
        self._kv.on_step(output)

    def tick(self) -> None:
        self._ingests.expire()
        self._kv.tick()

    def pending(self) -> int:
        return len(self._ingests) + len(self._kv.arrivals)

    def collect(self) -> Iterable[Metric]:
        transfers = self.handler.transfers
        yield gauge("tandem_kv_reservations", "Hand-offs that memory is set aside for.", len(self._ingests))
        yield histogram_family(
            "tandem_kv_transfer_seconds", "Time in transports per hand-off taken in.", [(transfers.seconds, {})]
        )
        yield histogram_family(
            "tandem_kv_transfer_exposed_seconds",
            "Part of a transfer after prefill had ended, per hand-off.",
            [(transfers.exposed_s, {})],
        )
        yield histogram_family("tandem_kv_transfer_bytes", "Bytes moved per hand-off.", [(transfers.bytes, {})])
        failures = [((code,), count) for code, count in self._puller.stats.failures.items()]
        yield counters("tandem_kv_transfer_failures_total", "Hand-offs that failed, by error code.", ("code",), failures)
        yield from self._kv.collect()

    async def close(self) -> None:
        await self._ingests.close()
        await self._puller.close()
        await self._kv.close()


DECODE = WorkerKind(role=lambda config: DecodeRole(), assemble=DecodeParts)
COLOCATED = WorkerKind(role=lambda config: ColocatedRole(), assemble=DecodeParts)


async def run(spec: HostSpec, stop: asyncio.Event, on_ready: Callable[[WorkerInfo], None] | None = None) -> None:
    """Runs a decode or colocated worker until `stop` is set; see `worker.shell.run_worker`."""
    await run_worker(spec, stop, COLOCATED if spec.role is WorkerRole.COLOCATED else DECODE, on_ready)
