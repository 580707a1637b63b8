"""The router's wiring: watch → dispatcher → sessions, and two fronts over one Frontend."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import random
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from importlib import metadata
from typing import NamedTuple

from core.clock import SystemClock
from core.config import Config
from core.cost_file import read_cost_model
from core.hostspec import HostSpec
from core.report import WorkerReport, WorkerState
from core.reporter import Reporter, first_report
from core.service import GrpcServer, Registration, serve
from core.telemetry import Metrics, MetricsServer
from core.text import Tokenizer
from router.attempt import Limits
from router.dispatch import Dispatcher
from router.exchange import Exchange, Totals
from router.explain import header_of
from router.frontend import Frontend
from router.frontend_types import FrontRequest
from router.http import build_app
from router.index_metrics import IndexMetrics
from router.links import Links
from router.metrics import PriorMetrics, RouterMetrics, RouterStats
from router.modelcard import VERSION_UNKNOWN, ModelKnowledge
from router.placing import Placer
from router.policies import make_policy
from router.pressure import RoleAdvisor
from router.prior import Prior
from router.replicas import Replicas
from router.service import InferenceServicer, StatusServicer
from router.slo import TermsOf
from router.span_export import SpanExporter
from router.store_links import StoreLinks
from router.view import ClusterView
from router.waiting_room import WaitingRoom
from router.watch import Watch
from router.web import WebServer
from tandem.v1.cluster_pb2_grpc import add_ClusterServicer_to_server
from tandem.v1.inference_pb2_grpc import add_InferenceServicer_to_server

log = logging.getLogger(__name__)

SERVER_GRACE_S = 0.5
SWITCH_INTERVAL_S = 0.0005
"""gRPC's own thread wants the interpreter for a moment for each message; at the default of 5 ms it may wait that long."""
GC_THRESHOLDS = (20_000, 20, 50)
"""Tokens under way are many objects for a moment and none is in a cycle; with the defaults all streams wait for collections."""
GRACE_SHARE = 0.8
ASSUMED_TTFT_S, ASSUMED_TBT_S = 5.0, 0.25  # of a default class without limits, for the proposal of roles alone
"""Of the grace time, for requests to finish; the rest is for leaving orderly."""


class RouterInfo(NamedTuple):
    """Where a router that is ready can be reached."""

    router_id: str
    grpc_address: str
    http_address: str


async def run(
    spec: HostSpec,
    stop: asyncio.Event,
    on_ready: Callable[[RouterInfo], None] | None = None,
    totals: Totals | None = None,
) -> None:
    """Serves until `stop` is set, then finishes what runs within the grace time.

    Raises ConfigError when it cannot start: no tokenizer, unknown policy, an address in use, a cost model of another model.
    """
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    text = await asyncio.to_thread(Tokenizer.load, spec.config.model.path)
    gc.collect()
    gc.freeze()  # what is there by now stays: collections need not look at it again
    gc.set_threshold(*GC_THRESHOLDS)
    await Router(spec, text, totals).serve(stop, on_ready)


class Router:
    """One router process, wired. `text` is the model's tokenizer; `totals`: what all routers served, where they share it."""

    def __init__(self, spec: HostSpec, text: Tokenizer, totals: Totals | None = None) -> None:
        config, clock = spec.config.router, SystemClock()
        self._spec = spec
        self._grace_s = spec.config.cluster.grace_s
        self._stats = stats = RouterStats()
        fetches = spec.config.store.fetch and spec.config.engine.prefix_cache
        placer = Placer(
            make_policy(config.policy),
            config.stale_after_s,
            random.Random(),
            config.index_blocks_max,
            fetches,
            config.hold_first_token,
        )
        self.dispatcher = Dispatcher(placer, limits_from(spec.config), WaitingRoom(config), clock)
        self._exchange = Exchange(self.dispatcher.room, totals, clock) if totals is not None else None
        self._watch = Watch(spec.controller, spec.worker_id, self._follow)
        self._replicas = replicas_of(spec, self._watch)
        scope = f"@{self._replicas.name}" if self._replicas is not None else ""
        self._links = Links(spec.worker_id, spec.epoch, config.session_lease_s, self.dispatcher, placer.events, scope)
        self._stores = StoreLinks(placer.events) if placer.events is not None else None
        self.dispatcher.links = self._links
        knowledge = ModelKnowledge(spec.config.model.name, _version())
        self._new_id = self._replicas.new_id if self._replicas is not None else lambda: uuid.uuid4().hex
        slow_client_s, terms_of = config.slow_client_s, TermsOf(config)
        self._spans = SpanExporter(config.traces, spec.worker_id) if config.traces else None
        on_end = self._trace if self._spans is not None else lambda request, request_id, took_s: None
        self.frontend = Frontend(self.dispatcher, text, knowledge, stats, clock, slow_client_s, terms_of, self._new_id, on_end)
        self._shared = self._replicas is not None and config.share_address
        self._inference = InferenceServicer(self.frontend, self._replicas)
        self._text = text
        self._metrics: list[Metrics] = [RouterMetrics(stats, self.dispatcher)]
        if placer.index is not None and placer.events is not None:
            self._metrics.append(IndexMetrics(placer.index, placer.events))
        if self._spans is not None:
            self._metrics.append(self._spans)
        self._clock = clock
        self._prior = prior_of(spec.config)
        if self._prior is not None:
            self._metrics.append(PriorMetrics(self._prior))
        self._said = first_report(spec)
        limits = config.classes[config.default_class]
        self._advisor = RoleAdvisor(limits.ttft_s or ASSUMED_TTFT_S, limits.tbt_s or ASSUMED_TBT_S)
        self._reporter = Reporter(spec, self._report, lambda deadline_s: self._drain.set())
        self._drain = asyncio.Event()
        self._changed = asyncio.Event()
        self.dispatcher.on_change = self._changed.set

    async def serve(self, stop: asyncio.Event, on_ready: Callable[[RouterInfo], None] | None = None) -> None:
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(self._links.close)
            if self._stores is not None:
                stack.push_async_callback(self._stores.close)
            stack.callback(self.dispatcher.close)
            server, web = await self._listen(stack)
            self._said = replace(self._said, grpc_address=server.address, http_address=web.address)
            await self._listen_alone(stack, web.address)
            await stack.enter_async_context(_running(self._watch.run(), "watch"))
            await stack.enter_async_context(_running(self._reporter.run(), "report"))
            if self._spans is not None:
                await stack.enter_async_context(_running(self._spans.run(), "send spans"))
            if self._exchange is not None:
                await stack.enter_async_context(_running(self._exchange.run(), "exchange of what tenants were served"))
            info = RouterInfo(self._spec.worker_id, server.address, web.address)
            announce = self._announce(server, info, on_ready)
            async with _running(announce, "announce readiness"):
                await _first(stop, self._drain)
            await self._finish(server, web)

    async def _listen(self, stack: contextlib.AsyncExitStack) -> tuple[GrpcServer, WebServer]:
        """The two fronts, where users connect."""
        config, shared = self._spec.config.router, self._shared
        render = MetricsServer("", self._metrics).render
        app = build_app(self.frontend, self._text, render, config.max_body_bytes, self._watch.scrape_targets, self._new_id)
        web = await stack.enter_async_context(WebServer(app, config.http, SERVER_GRACE_S, shared=shared))
        server = serve(
            config.grpc,
            Registration("tandem.v1.Inference", add_InferenceServicer_to_server, self._inference),
            Registration("tandem.v1.Cluster", add_ClusterServicer_to_server, StatusServicer(self._watch.status)),
            grace_s=SERVER_GRACE_S,
            message_bytes_max=config.max_body_bytes,
            shared=shared,
        )
        return await stack.enter_async_context(server), web

    async def _listen_alone(self, stack: contextlib.AsyncExitStack, http_address: str) -> None:
        """Where this router and no other answers: other routers, and whoever scrapes its metrics."""
        if self._replicas is None:
            self._said = replace(self._said, metrics_address=http_address)
            return
        stack.push_async_callback(self._replicas.close)
        listen = self._spec.listen
        own = Registration("tandem.v1.Inference", add_InferenceServicer_to_server, self._inference)
        peer = await stack.enter_async_context(serve(listen, own, grace_s=SERVER_GRACE_S))
        metrics = await stack.enter_async_context(MetricsServer(f"{listen.rpartition(':')[0]}:0", self._metrics))
        self._said = replace(self._said, peer_address=peer.address, metrics_address=metrics.address)

    async def _announce(self, server: GrpcServer, info: RouterInfo, on_ready: Callable[[RouterInfo], None] | None) -> None:
        """Tells health checks, the controller and the host whether requests can be served, whenever that changes."""
        was: bool | None = None
        while True:
            self._changed.clear()
            if self._prior is not None and was is not True:
                self._prior.check(self.dispatcher.view)
            ready = self.frontend.ready()
            if ready != was:
                await server.set_serving(ready)
                self._reporter.changed()
                if ready and on_ready is not None:
                    on_ready(info)
                    on_ready = None
                was = ready
            await self._changed.wait()

    def _follow(self, view: ClusterView) -> None:
        """A snapshot as it came; the dispatcher sees it with what the cost model says of those who have learned nothing."""
        if self._prior is not None:
            for line in self._prior.watch(self._clock.now(), view):
                log.warning(line)
            view = self._prior.under(view)
        self.dispatcher.follow(view)
        self.dispatcher.situation().prepare()
        if self._stores is not None:
            self._stores.follow(view)

    def _trace(self, request: FrontRequest, request_id: str, took_s: float) -> None:
        assert self._spans is not None
        self._spans.ended(request_id, request.traceparent, took_s, lambda: header_of(self.frontend, request_id))

    def _report(self) -> WorkerReport:
        """Once it has been ready, a router without workers is still ready: it queues until they are replaced."""
        state = self._said.state
        if state is WorkerState.STARTING and self.frontend.ready():
            state = WorkerState.READY
        self._said = replace(
            self._said,
            state=state,
            running=self.frontend.live,
            waiting=len(self.dispatcher.queue),
            demand=self._stats.demand,
            proposal=self._advisor.advise(self.dispatcher.situation(), self._clock.now()),
        )
        return self._said

    async def _finish(self, server: GrpcServer, web: WebServer) -> None:
        self.frontend.begin_close()
        await server.set_serving(False)
        self._said = replace(self._said, state=WorkerState.DRAINING)
        self._reporter.changed()
        grace_s = self._grace_s * GRACE_SHARE
        try:
            async with contextlib.AsyncExitStack() as stack, asyncio.timeout(grace_s):
                if self._replicas is not None:  # new calls find another router
                    web.turn_away()
                    await stack.enter_async_context(_running(server.turn_away(grace_s), "turn calls away"))
                await self.frontend.drained()
        except TimeoutError:
            log.warning("%d requests did not finish within the grace time and are cancelled", self.frontend.live)


def replicas_of(spec: HostSpec, watch: Watch) -> Replicas | None:
    """The other routers, where there are to be any."""
    if spec.config.cluster.routers == 1:
        return None
    return Replicas(spec.worker_id, spec.epoch, lambda: watch.latest.workers)


def limits_from(config: Config) -> Limits:
    router = config.router
    return Limits(
        queue_timeout_s=router.queue_timeout_s,
        request_timeout_s=router.request_timeout_s,
        max_attempts=router.max_attempts,
    )


def prior_of(config: Config) -> Prior | None:
    """What `router.cost_model` names. Raises ConfigError when it is no cost model."""
    path = config.router.cost_model
    return Prior(read_cost_model(path), path, config.transfer.transport) if path else None


def _version() -> str:
    try:
        return metadata.version("tandem")
    except metadata.PackageNotFoundError:
        return VERSION_UNKNOWN


async def _first(*events: asyncio.Event) -> None:
    """Until one of them is set."""
    waits = [asyncio.create_task(event.wait(), name="wait for the end") for event in events]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


@contextlib.asynccontextmanager
async def _running(work: Coroutine[object, object, None], name: str) -> AsyncIterator[None]:
    """A task of ours beside the block: its failure ends the block, the block's end cancels it."""
    async with asyncio.TaskGroup() as group:
        task = group.create_task(work, name=name)
        try:
            yield
        finally:
            task.cancel()
