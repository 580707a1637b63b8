"""A router on virtual time: the shipped dispatcher with all it drives, over sessions that are messages of the simulation."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from core.blocks import BlockKey
from core.errors import OverloadedError
from core.kv_changes import KvChanges
from core.request import Slo
from router import events as ev
from router.attempt import JourneySpec, Limits
from router.dispatch import Dispatcher
from router.frontend_types import FrontRequest
from router.placing import Placer
from router.policies import make_policy
from router.situation import Situation
from router.slo import Terms, TermsOf
from router.view import ClusterView, WorkerView
from router.waiting_room import WaitingRoom
from sim.events import Event
from sim.prompt import STOP_ID, Content, Prompt
from sim.requests import Request, Users
from sim.rng import Streams
from sim.site import Site
from sim.talk import Addressed
from sim.worker import SimWorker
from sim.workload import Arrival
from tandem.sampling import SamplingParams

KEEPALIVE_S = 5.0
"""After which a session whose other end is out of reach is given up (`router.links.CHANNEL_OPTIONS`)."""
BACKOFF_MIN_S, BACKOFF_MAX_S = 0.05, 2.0


class SimPlacer(Placer):
    """Knows the keys of counted prompts, which have no tokens to make them of."""

    def keys(self, situation: Situation, spec: JourneySpec) -> tuple[BlockKey, ...]:
        if not isinstance(spec.prompt, Prompt):
            return super().keys(situation, spec)
        content = spec.prompt.content
        return tuple(content.keys(len(spec.prompt) // content.size)) if self.index is not None else ()


class SimRouter:
    def __init__(self, name: str, site: Site, streams: Streams, users: Users, policy: str) -> None:
        config = site.config.router
        self.name = name
        self.site = site
        self._users = users
        placer = SimPlacer(
            make_policy(policy),
            config.stale_after_s,
            streams.stream(f"draws of {name}"),
            config.index_blocks_max,
            site.config.store.fetch,
            config.hold_first_token,
        )
        self.room = WaitingRoom(config)
        limits = Limits(config.queue_timeout_s, config.request_timeout_s, config.max_attempts)
        self.dispatcher = Dispatcher(placer, limits, self.room, site.events, site.events)
        self.links = SimLinks(self, placer)
        self.dispatcher.links = self.links
        self._terms_of = TermsOf(config)
        self._terms: dict[tuple[str, str], Terms] = {}
        slo = site.config.sim.slo
        self._slo = Slo(slo.ttft_s, slo.tbt_s, slo.tpot_s)

    # ---- users -----------------------------------------------------------------------------------------------------

    def arrive(self, name: str, arrival: Arrival, content: Content) -> None:
        now = self.site.events.now()
        terms = self._resolve(arrival)
        request = Request(name, content, terms.slo, now, self._users)
        self._users.began(request)
        exact = self.site.config.sim.engine == "exact"
        prompt = content.prompt_ids() if exact else cast(tuple[int, ...], Prompt(content, content.input_tokens))
        seed = content.number
        self.site.contents[seed] = content
        spec = JourneySpec(
            name,
            prompt,
            SamplingParams(max_tokens=self._most(content), seed=seed),
            eos_token_ids=(STOP_ID,),
            slo=terms.slo,
            slo_class=terms.slo_class,
            tenant=terms.tenant,
            priority=terms.priority,
            deadline_s=terms.deadline_s,
        )
        try:
            self.dispatcher.check_room(terms)
            request.journey = self.dispatcher.start(spec, request, now)
        except OverloadedError as error:
            request.finish(None, error)

    def _resolve(self, arrival: Arrival) -> Terms:
        asked = arrival.slo_class, arrival.tenant
        terms = self._terms.get(asked)
        if terms is None:
            slo = Slo() if arrival.slo_class else self._slo
            terms = self._terms_of(FrontRequest((), slo_class=arrival.slo_class, slo=slo, tenant=arrival.tenant))
            self._terms[asked] = terms
        return terms

    def _most(self, content: Content) -> int:
        """What it names as max_tokens."""
        asked = self.site.config.sim.answer_tokens_max
        if asked is None:
            return content.output_tokens
        return max(content.output_tokens, min(asked, self.site.capacity_tokens - content.input_tokens - 1))

    # ---- workers and the controller --------------------------------------------------------------------------------

    def follow(self, view: ClusterView) -> None:
        self.dispatcher.follow(view)

    def heard(self, worker: str, epoch: int, events: list[Addressed]) -> None:
        if self.links.is_up(worker, epoch):
            self.dispatcher.heard(worker, events)


class SimLinks:
    """Sessions of one router with the incarnations of workers that its view names."""

    def __init__(self, router: SimRouter, placer: Placer) -> None:
        self._router = router
        self._kv = placer.events
        self._links: dict[str, _Link] = {}
        self._connected: frozenset[str] | None = frozenset()

    def connected(self) -> frozenset[str]:
        if self._connected is None:
            self._connected = frozenset(name for name, link in self._links.items() if link.up)
        return self._connected

    def is_up(self, worker: str, epoch: int) -> bool:
        link = self._links.get(worker)
        return link is not None and link.up and link.view.epoch == epoch

    def send(self, command: ev.Send) -> None:
        link = self._links[command.worker]
        if link.up and link.worker is not None:
            router = self._router
            router.site.post.send(router.name, link.worker.name, link.worker.command, router, command)

    def follow(self, view: ClusterView) -> None:
        wanted = {worker.worker_id: worker for worker in view.serving()}
        for name, link in list(self._links.items()):
            worker = wanted.get(name)
            unnamed = name not in view.workers and link.up
            if not unnamed and (worker is None or worker.epoch != link.view.epoch):
                link.retire()
                del self._links[name]
        for name, worker in wanted.items():
            if name in self._links:
                self._links[name].view = worker
            else:
                self._links[name] = link = _Link(self, worker)
                link.dial()

    def broken(self, worker: str, epoch: int, reason: str) -> None:
        """The session's other end is gone."""
        link = self._links.get(worker)
        if link is not None and link.view.epoch == epoch and link.up:
            link.down(reason)
            link.dial()

    def apart(self, worker: str) -> None:
        """The two cannot reach each other: after a while of silence both ends notice, unless they can again by then."""
        link = self._links.get(worker)
        if link is not None and link.up:
            self._router.site.events.later(KEEPALIVE_S, link.judge)

    def heard_of_blocks(self, worker: str, epoch: int, changes: KvChanges) -> None:
        if self._kv is not None and self.is_up(worker, epoch):
            again = self._kv.heard(worker, changes)
            link = self._links[worker]
            if again is not None and link.worker is not None:
                self._follow_kv(link.worker, again)

    def changed(self, link: _Link, reason: str = "") -> None:
        self._connected = None
        router, name = self._router, link.view.worker_id
        if not link.up:
            if self._kv is not None:
                self._kv.down(name)
            router.dispatcher.link_down(name, reason)
            return
        router.dispatcher.link_up(name)
        if self._kv is not None and link.worker is not None:
            self._follow_kv(link.worker, self._kv.up(name))

    @property
    def router(self) -> SimRouter:
        return self._router

    def _follow_kv(self, worker: SimWorker, stream: int) -> None:
        router = self._router
        router.site.post.send(router.name, worker.name, worker.feeds.follow, router, stream)


class _Link:
    def __init__(self, links: SimLinks, view: WorkerView) -> None:
        self.view = view
        self.up = False
        self.worker: SimWorker | None = None
        self._links = links
        self._retired = False
        self._pause_s = BACKOFF_MIN_S
        self._dialling: Event | None = None

    def dial(self, pause_s: float = 0.0) -> None:
        site = self._links.router.site
        self._dialling = site.events.at(site.events.now() + pause_s + 2 * site.post.latency_s, self._answered)

    def retire(self) -> None:
        self._retired = True
        if self._dialling is not None:
            self._dialling.cancel()
        if self.up:
            self.down("the cluster says it is gone, or it was replaced")

    def down(self, reason: str) -> None:
        worker, router = self.worker, self._links.router
        self.up = False
        if worker is not None and worker.alive:
            worker.talk.detached(router)
        self._links.changed(self, reason)

    def judge(self) -> None:
        router, worker = self._links.router, self.worker
        if self.up and worker is not None and not router.site.post.together(router.name, worker.name):
            self.down("nothing has been heard of it")
            self.dial(BACKOFF_MIN_S)

    def _answered(self) -> None:
        router = self._links.router
        worker = router.site.find(self.view.worker_id, self.view.epoch)
        if worker is None or not router.site.post.together(router.name, worker.name):
            self._pause_s = min(2 * self._pause_s, BACKOFF_MAX_S)
            self.dial(self._pause_s)
            return
        self.worker, self.up, self._pause_s = worker, True, BACKOFF_MIN_S
        worker.talk.attached(router)
        self._links.changed(self)


Follow = Callable[[ClusterView], None]
