"""Runs a store node: report, serve, announce, drain, leave nothing behind. It loads no model and no torch."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from typing import NamedTuple

from core.clock import SystemClock
from core.hostspec import HostSpec
from core.report import WorkerReport, WorkerState
from core.reporter import Reporter, first_report
from core.service import GrpcServer, Registration, serve
from core.telemetry import MetricsServer
from kvtransfer.arena import host_id
from kvtransfer.directory import Directory, open_directory
from kvtransfer.store_announcer import StoreAnnouncer
from kvtransfer.store_feed import StoreFeed
from kvtransfer.store_metrics import StoreMetrics
from kvtransfer.store_node import StoreNode
from kvtransfer.store_plane import check_room
from kvtransfer.store_replicas import Replicas
from kvtransfer.store_service import StoreServicer
from tandem.v1 import kv_pb2_grpc

log = logging.getLogger(__name__)

TICK_S = 0.5
SERVER_GRACE_S = 0.5
REPLICATE_EVERY_S = 5.0  # at most; four times in a window
READERS_GRACE_S = 1.0  # of a store that ends: readers have other sources, and the disk wants its time too


class StoreInfo(NamedTuple):
    """Where a store that is ready can be reached."""

    worker_id: str
    grpc_address: str
    metrics_address: str


async def run(spec: HostSpec, stop: asyncio.Event, on_ready: Callable[[StoreInfo], None] | None = None) -> None:
    """Runs until `stop` is set, then lets those who read finish within the grace time.

    Raises ConfigError when it cannot start.
    """
    check_room(spec.config)
    store = _Store(spec)
    try:
        async with _running(store.reporter.run(), "report"):
            await store.serve(stop, on_ready)
    except BaseExceptionGroup as group:
        raise _cause(group) from group


class _Store:
    def __init__(self, spec: HostSpec) -> None:
        self._spec = spec
        self._clock = SystemClock()
        self._host_id = host_id(spec.config.transfer.shm_dir)
        self._state = WorkerState.STARTING
        self._server: GrpcServer | None = None
        self._metrics: MetricsServer | None = None
        self._draining = asyncio.Event()
        self._node = StoreNode(spec, self._clock, self._host_id, self._grpc_address)
        self._feed = StoreFeed(self._node, self._clock)
        self.reporter = Reporter(spec, self._report, self._on_drain)

    async def serve(self, stop: asyncio.Event, on_ready: Callable[[StoreInfo], None] | None) -> None:
        config = self._spec.config
        directory = open_directory(config.store, config.redis, self._spec.controller)
        announcer = StoreAnnouncer(self._node, directory, config.store.directory_ttl_s, self._clock)
        replicas = self._replicas(directory)
        try:
            async with self._listening(announcer, replicas) as (server, metrics):
                await self._node.start()
                self._say(WorkerState.READY)
                if on_ready is not None:
                    on_ready(StoreInfo(self._spec.worker_id, server.address, metrics.address))
                async with (
                    _running(self._replicate(replicas), "replicate"),
                    _running(announcer.run(), "announce"),
                    _running(self._tick(), "tick"),
                    _running(self._drain(), "drain"),
                ):
                    await stop.wait()
                    await self._refuse()
                await announcer.leave()
                await self._idle_within(min(READERS_GRACE_S, config.cluster.grace_s / 4))
        finally:
            await directory.close()
            await self._node.close()

    @contextlib.asynccontextmanager
    async def _listening(
        self, announcer: StoreAnnouncer, replicas: Replicas | None
    ) -> AsyncIterator[tuple[GrpcServer, MetricsServer]]:
        spec = self._spec
        metrics_address = f"{spec.listen.rpartition(':')[0]}:0"
        servicer = StoreServicer(self._node, self._feed)
        async with (
            MetricsServer(metrics_address, (StoreMetrics(self._node, announcer, replicas),)) as metrics,
            serve(
                spec.listen,
                Registration("tandem.v1.Kv", kv_pb2_grpc.add_KvServicer_to_server, servicer),
                grace_s=SERVER_GRACE_S,
            ) as server,
        ):
            self._server, self._metrics = server, metrics
            yield server, metrics

    def _replicas(self, directory: Directory) -> Replicas | None:
        """Only when asked for: a cluster of one host has nobody to copy to."""
        store = self._spec.config.store
        if not store.replicate_hits:
            return None
        return Replicas(self._node, directory, store.replicate_hits, store.replicate_window_s, self._clock, self._host_id)

    async def _replicate(self, replicas: Replicas | None) -> None:
        if replicas is None:
            return
        try:
            await replicas.run(min(REPLICATE_EVERY_S, self._spec.config.store.replicate_window_s / 4))
        finally:
            await replicas.close()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._node.tick()
            self._feed.poke()

    async def _drain(self) -> None:
        """A drain ordered by the controller: it stops us once our reports say that nobody reads here."""
        await self._draining.wait()
        await self._refuse()

    async def _refuse(self) -> None:
        """From now on no block comes in; what is here can be read."""
        self._node.accepting = False
        self._say(WorkerState.DRAINING)
        if self._server is not None:
            await self._server.set_serving(False)

    async def _idle_within(self, grace_s: float) -> None:
        """Until nobody reads any more; new readers no longer find us."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                while self._leases_open() or len(self._node.offers):
                    await asyncio.sleep(0.05)
                    self._node.tick()

    def _report(self) -> WorkerReport:
        plane = self._node.plane
        report = replace(
            first_report(self._spec),
            state=self._state,
            grpc_address=self._server.address if self._server is not None else "",
            metrics_address=self._metrics.address if self._metrics is not None else "",
            host_id=self._host_id,
            waiting=len(self._node.offers),
            leases_open=self._leases_open(),
            layout=self._node.layout,
            progress=0.0 if self._state is WorkerState.STARTING else 1.0,
        )
        if plane is None:
            return report
        return replace(report, blocks=plane.inventory.counts(), detail=f"disk off: {plane.disk.off}" if plane.disk.off else "")

    def _leases_open(self) -> int:
        return self._node.plane.inventory.leases_open() if self._node.plane is not None else 0

    def _grpc_address(self) -> str:
        assert self._server is not None, "nobody can ask before the server listens"
        return self._server.address

    def _on_drain(self, deadline_s: float) -> None:
        log.info("draining: no new blocks; the controller gives %g s", deadline_s)
        self._draining.set()

    def _say(self, state: WorkerState) -> None:
        self._state = state
        self.reporter.changed()


@contextlib.asynccontextmanager
async def _running(work: Coroutine[object, object, None], name: str) -> AsyncIterator[None]:
    """A task of ours beside the block: its failure ends the block, the block's end cancels it."""
    async with asyncio.TaskGroup() as group:
        task = group.create_task(work, name=name)
        try:
            yield
        finally:
            task.cancel()


def _cause(error: BaseException) -> BaseException:
    """What went wrong first, out of the groups that task groups make."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
