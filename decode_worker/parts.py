"""What makes a worker a decode worker, or a colocated one: reservations, the pulls that fill them, the Decode service."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import Metric

from core.service import Registration
from core.telemetry import histogram_family
from decode_worker.ingest import Ingests
from decode_worker.service import DecodeHandler
from engine.output import StepOutput
from kvtransfer.codec import LOSSY
from kvtransfer.puller import Puller
from tandem.v1 import decode_pb2_grpc
from worker.collectors import counters, gauge
from worker.kv_plane import KvPlane
from worker.session import SessionServicer
from worker.shell import Base


class DecodeParts:
    """Shares engine, links and `kv` with whatever else the worker does."""

    def __init__(self, base: Base, kv: KvPlane) -> None:
        spec, node, clock = base.spec, base.node, base.clock
        config = spec.config
        self._kv = kv
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
        return [Registration("tandem.v1.Decode", decode_pb2_grpc.add_DecodeServicer_to_server, session)]

    def on_step(self, output: StepOutput, started: float) -> None:
        self.handler.on_step(output, started)

    def tick(self) -> None:
        self._ingests.expire()

    def pending(self) -> int:
        """Hand-offs that the engine does not know yet."""
        return len(self._ingests)

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

    async def close(self) -> None:
        await self._ingests.close()
        await self._puller.close()
