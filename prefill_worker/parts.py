"""What makes a worker a prefill worker: hand-offs of the prompts it computes, and the Prefill service."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import Metric

from core.service import Registration
from engine.output import StepOutput
from kvtransfer.handoff import ExportState
from prefill_worker.publish import Publisher
from prefill_worker.service import PrefillHandler
from tandem.v1 import prefill_pb2_grpc
from worker.collectors import counters, gauge
from worker.kv_plane import KvPlane
from worker.session import SessionServicer
from worker.shell import Base


class PrefillParts:
    """Shares engine, links and `kv` with whatever else the worker does."""

    def __init__(self, base: Base, kv: KvPlane) -> None:
        spec, node = base.spec, base.node
        config = spec.config.transfer
        self._kv = kv
        self._publisher = Publisher(base.engine, base.links, self._kv.exports)
        self._kv.exports.on_end = self._publisher.on_export_ended
        self.handler = PrefillHandler(
            base.engine, base.links, self._kv, self._publisher, node.layout, config.lease_s, config.codec
        )

    def registrations(self, session: SessionServicer) -> list[Registration]:
        return [Registration("tandem.v1.Prefill", prefill_pb2_grpc.add_PrefillServicer_to_server, session)]

    def on_step(self, output: StepOutput, started: float) -> None:
        self._publisher.on_step(output, started)

    def collect(self) -> Iterable[Metric]:
        exports = self._kv.exports
        yield gauge("tandem_kv_exports_open", "Hand-offs on offer to decode workers.", len(exports))
        ended = [((state.value,), exports.ended[state]) for state in _ENDED]
        yield counters("tandem_kv_exports_total", "Hand-offs by how they ended here.", ("state",), ended)


_ENDED = (ExportState.DONE, ExportState.EXPIRED, ExportState.REVOKED)
