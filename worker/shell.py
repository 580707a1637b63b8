"""The life of a worker: load, serve, drain, leave nothing behind. What differs between roles comes in as `Parts`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, Protocol

from prometheus_client.core import Metric

from core.clock import Clock, SystemClock
from core.config import Config
from core.errors import OverloadedError, UnavailableError
from core.hostspec import HostSpec
from core.report import WorkerReport, WorkerState
from core.reporter import Reporter, first_report
from core.request import WorkerRole
from core.service import GrpcServer, Registration, serve
from core.telemetry import MetricsServer
from engine.loop import StepLoop
from engine.output import StepOutput
from engine.role import Role
from kvtransfer.arena import host_id
from worker.bridge import EngineThread
from worker.collectors import WorkerMetrics
from worker.kv_feeds import KvFeeds
from worker.links import RouterLinks
from worker.node import Node, build_node
from worker.session import Handler, SessionServicer

log = logging.getLogger(__name__)

TICK_S = 0.5
ENGINE_STOP_S = 5.0
SERVER_GRACE_S = 0.5
# The engine thread gives the interpreter up in every tensor operation and must get it back quickly; asyncio's turns are
# short. At the default of 5 ms one busy turn of the asyncio thread could cost a decode step that much.
SWITCH_INTERVAL_S = 0.0005


class WorkerInfo(NamedTuple):
    """Where a worker that is ready can be reached."""

    worker_id: str
    grpc_address: str
    metrics_address: str


@dataclass(frozen=True, slots=True)
class Base:
    """What a role builds on."""

    spec: HostSpec
    node: Node
    engine: EngineThread
    links: RouterLinks
    clock: Clock
    host_id: str
    grpc_address: Callable[[], str]
    """Known once the server listens."""


class Parts(Protocol):
    """What a role brings to the shell. Everything is called on the asyncio thread."""

    @property
    def handler(self) -> Handler: ...

    def registrations(self, session: SessionServicer) -> list[Registration]: ...

    def started(self) -> None:
        """The server listens: `Base.grpc_address` is known."""
        ...

    def on_step(self, output: StepOutput, started: float) -> None: ...

    def tick(self) -> None:
        """Called a few times per second: expire what nobody came for."""
        ...

    def pending(self) -> int:
        """Attempts that hold something here and that the engine does not know (yet, or any more)."""
        ...

    def collect(self) -> Iterable[Metric]: ...

    async def close(self) -> None:
        """Everything ends and is given back; the engine thread has ended."""
        ...


class WorkerKind(NamedTuple):
    role: Callable[[Config, WorkerRole], Role]
    assemble: Callable[[Base], Parts]


async def run_worker(
    spec: HostSpec,
    stop: asyncio.Event,
    kind: WorkerKind,
    on_ready: Callable[[WorkerInfo], None] | None = None,
) -> None:
    """Runs a worker until `stop` is set, then finishes what runs within the grace time.

    Raises ConfigError when it cannot start, and whatever the engine thread crashed with.
    """
    shell = _Shell(spec, kind)
    try:
        async with _running(shell.reporter.run(), "report"):
            node = await shell.load()
            try:
                await shell.serve(node, stop, on_ready)
            finally:
                node.close()
    except BaseExceptionGroup as group:
        raise _cause(group) from group


class _Shell:
    def __init__(self, spec: HostSpec, kind: WorkerKind) -> None:
        self._spec = spec
        self._kind = kind
        self._clock = SystemClock()
        self._said = replace(first_report(spec), host_id=host_id(spec.config.transfer.shm_dir))
        self._measure: Callable[[WorkerReport], WorkerReport] = lambda report: report
        self._draining = asyncio.Event()
        self._server: GrpcServer | None = None
        self._poke: Callable[[], None] = lambda: None
        self.reporter = Reporter(spec, lambda: self._measure(self._said), self._on_drain, self._on_role)
        self._engine: EngineThread | None = None

    async def load(self) -> Node:
        """Builds the node in a thread of its own. Cancelled, it stops that thread and leaves nothing of what it built."""
        aio = asyncio.get_running_loop()
        abandoned = threading.Event()

        def progress(share: float, detail: str) -> None:
            if abandoned.is_set():
                raise UnavailableError("the worker was stopped while it started")
            aio.call_soon_threadsafe(self._say, {"progress": share, "detail": detail})

        building = asyncio.ensure_future(asyncio.to_thread(build_node, self._spec, progress))
        try:
            return await asyncio.shield(building)
        except asyncio.CancelledError:
            abandoned.set()
            await asyncio.wait([building])
            if building.exception() is None:
                building.result().close()
            raise

    async def serve(self, node: Node, stop: asyncio.Event, on_ready: Callable[[WorkerInfo], None] | None) -> None:
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        config, links = self._spec.config, RouterLinks(self._clock)
        loop = StepLoop(
            config.engine,
            self._kind.role(config, self._said.role),
            node.inventory,
            node.executor,
            node.root_key,
            self._clock.now,
        )
        engine = EngineThread(loop, self._clock)
        self._engine = engine
        base = Base(self._spec, node, engine, links, self._clock, self._said.host_id, self._grpc_address)
        parts = self._kind.assemble(base)
        links.bind(parts.handler.cancel)
        try:
            async with self._listening(base, parts) as (server, metrics):
                self._server = server
                parts.started()
                self._measure = lambda report: _measured(report, base, parts)
                self._say(
                    {
                        "state": WorkerState.READY,
                        "grpc_address": server.address,
                        "metrics_address": metrics.address,
                        "layout": node.layout,
                        "model": node.facts,
                        "progress": 1.0,
                        "detail": "",
                    }
                )
                if on_ready is not None:
                    on_ready(WorkerInfo(self._spec.worker_id, server.address, metrics.address))
                async with _running(self._tick(links, parts), "tick"), _running(self._drain(links), "drain"):
                    await _either(stop.wait(), engine)
                    await self._finish(links, engine)
        finally:
            if not await engine.stop(ENGINE_STOP_S):
                log.error("the engine thread did not end within %g s", ENGINE_STOP_S)
            await parts.close()

    @contextlib.asynccontextmanager
    async def _listening(self, base: Base, parts: Parts) -> AsyncIterator[tuple[GrpcServer, MetricsServer]]:
        spec = self._spec
        feeds = KvFeeds(base.node.inventory, base.links)
        session = SessionServicer(spec.worker_id, spec.epoch, base.links, parts.handler, feeds)
        metrics_address = f"{spec.listen.rpartition(':')[0]}:0"
        sources = (WorkerMetrics(base.engine, base.node.inventory, base.links), parts)

        def on_step(output: StepOutput, started: float) -> None:
            parts.on_step(output, started)
            feeds.poke()

        base.engine.start(on_step)
        self._poke = feeds.poke
        try:
            async with (
                MetricsServer(metrics_address, sources) as metrics,
                serve(spec.listen, *parts.registrations(session), grace_s=SERVER_GRACE_S) as server,
            ):
                yield server, metrics
        finally:
            feeds.close()

    async def _finish(self, links: RouterLinks, engine: EngineThread) -> None:
        """No new attempts; those that run end by themselves or, when the grace time is over, by us."""
        await self._refuse(links)
        grace_s = self._spec.config.cluster.grace_s * 0.8  # the rest is for leaving orderly
        try:
            async with asyncio.timeout(grace_s):
                await _either(links.drained(), engine)
        except TimeoutError:
            log.warning("%d attempts did not finish within %g s", len(links.table), grace_s)
        links.cancel_all("stopped")
        links.close()

    async def _refuse(self, links: RouterLinks) -> None:
        """From now on no attempt enters, and reports and health checks say so."""
        links.accepting = False
        self._say({"state": WorkerState.DRAINING})
        if self._server is not None:
            await self._server.set_serving(False)

    async def _tick(self, links: RouterLinks, parts: Parts) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            links.expire()
            parts.tick()
            self._poke()  # blocks come and go without steps too

    async def _drain(self, links: RouterLinks) -> None:
        """A drain ordered by the controller: it stops us once our reports say that nothing runs here."""
        await self._draining.wait()
        await self._refuse(links)
        await links.drained()
        self.reporter.changed()

    def _grpc_address(self) -> str:
        assert self._server is not None, "nobody can ask before the server listens"
        return self._server.address

    def _on_drain(self, deadline_s: float) -> None:
        log.info("draining: no new attempts; the controller gives %g s", deadline_s)
        self._draining.set()

    def _on_role(self, role: WorkerRole) -> None:
        """Takes effect between two steps. While it still loads, the next report asks for the order again."""
        engine, now = self._engine, self._said.role
        if engine is None or role is now or self._said.state is not WorkerState.READY:
            return
        log.info("role: %s from now on, %s until now", role.value, now.value)
        try:
            engine.call(partial(_play, self._kind.role(self._spec.config, role)), lambda error: None)
        except OverloadedError as error:
            log.warning("the role stays %s for now: %s", now.value, error.message)
            return
        self._say({"role": role})

    def _say(self, changes: dict[str, object]) -> None:
        self._said = replace(self._said, **changes)  # type: ignore[arg-type]
        self.reporter.changed()


def _play(role: Role, loop: StepLoop, now: float) -> None:
    loop.role = role


def _measured(report: WorkerReport, base: Base, parts: Parts) -> WorkerReport:
    load, inventory = base.engine.load, base.node.inventory
    return replace(
        report,
        blocks=inventory.counts(),
        leases_open=inventory.leases_open(),
        running=load.running,
        waiting=load.waiting + parts.pending(),
        waiting_tokens=load.waiting_tokens,
        context_tokens=load.context_tokens,
        step_cost=base.engine.step_cost(),
    )


async def _either(event: Coroutine[object, object, object], engine: EngineThread) -> None:
    """Waits for `event`; raises what the engine thread crashes with meanwhile."""
    waiting = asyncio.ensure_future(event)
    try:
        await asyncio.wait((waiting, engine.finished), return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
    if engine.finished.done():
        engine.finished.result()


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
