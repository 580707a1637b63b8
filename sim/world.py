"""A cluster on virtual time, wired: routers, workers, controller, network, and the users that come with a workload."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from core.config import Config
from core.cost_model import CostModel
from core.errors import ConfigError
from core.request import WorkerRole
from sim.cluster import CONTROLLER, Pools, SimController, pools_of
from sim.events import Events
from sim.network import Network
from sim.plane import SimPlane
from sim.post import Post
from sim.prompt import Content
from sim.requests import Request, Users
from sim.rng import Streams
from sim.router import SimRouter
from sim.site import Site
from sim.worker import SimWorker
from sim.workload import Arrival

WARM_S = 1.0
"""Before the first arrival: sessions come up and routers hear of everybody."""


class World:
    """`drained` turns true once every request has come and ended."""

    def __init__(
        self, config: Config, arrivals: Iterator[Arrival], policy: str, seed: int, model: CostModel | None = None
    ) -> None:
        """Raises ConfigError: no worker that could serve, a profile that cannot be used, an unknown policy."""
        self.streams = Streams(seed)
        self.events = Events()
        links = config.sim.links
        network = Network(self.events, links.bandwidth, links.latency)
        self.post = Post(self.events, links.latency)
        self.site = Site(config, self.events, self.post, network)
        check_pools(config)
        self.pools = Pools(config, model)
        if config.sim.directory:
            self.site.plane = SimPlane(self.site, self.pools.all()[0][1].layout)
        self.site.capacity_tokens = min(
            replica.num_blocks * config.engine.block_size for pool, replica in self.pools.all() if pool.role != "prefill"
        )
        self.users = Users(links.latency, self.events.now)
        self.users.on_end = self._ended
        self.routers = [
            SimRouter(f"router-{n}", self.site, self.streams, self.users, policy) for n in range(config.sim.routers)
        ]
        self.controller = SimController(self.site, self.pools, self.streams.stream("lost reports"))
        self.controller.on_death = self.kill
        self.arrived = 0
        self.last_arrival_s = 0.0
        self.on_arrival: Callable[[], None] = lambda: None
        self._arrivals = arrivals
        self.exhausted = False
        self._until = config.sim.duration_s or float("inf")

    def start(self) -> None:
        self.controller.start(self.routers)
        self._next()

    @property
    def drained(self) -> bool:
        return self.exhausted and not self.users.live

    # ---- users -----------------------------------------------------------------------------------------------------

    def _next(self) -> None:
        """One arrival is known at a time, so that a trace of any length takes no memory."""
        arrival = next(self._arrivals, None)
        if arrival is None or arrival.arrival_s > self._until:
            self.exhausted = True
            if self.drained:
                self.events.halt()
            return
        self.events.at(WARM_S + arrival.arrival_s, self._arrive, arrival)

    def _arrive(self, arrival: Arrival) -> None:
        number = self.arrived
        self.arrived += 1
        self.last_arrival_s = arrival.arrival_s
        most = self.site.capacity_tokens
        if arrival.input_tokens + arrival.output_tokens > most:
            text = f"request {number} has {arrival.input_tokens} + {arrival.output_tokens} tokens, a worker holds {most}"
            raise ConfigError(f"{text}; give workers more memory (kv_bytes), or leave such requests out")
        content = Content(arrival, number + (self.streams.seed << 40), self.site.config.engine.block_size)
        self.routers[number % len(self.routers)].arrive(f"r{number}", arrival, content)
        self.on_arrival()
        self._next()

    def _ended(self, request: Request) -> None:
        """Of a request that is over nothing is kept but what was added up."""
        self.site.contents.pop(request.content.number, None)
        if self.drained:
            self.events.halt()

    # ---- what happens to workers -----------------------------------------------------------------------------------

    def kill(self, worker: SimWorker) -> None:
        """The process dies now: its sessions break, pulls from it fail, the launcher notices."""
        if not worker.alive:
            return
        worker.die()
        name, epoch = worker.name, worker.epoch
        for router in self.routers:
            self.post.send(name, router.name, router.links.broken, name, epoch, "its process died")
        for other in self.site.workers.values():
            if other is not worker:
                self.post.send(name, other.name, other.ingests.source_gone, name, epoch)
        self.post.send(name, CONTROLLER, self.controller.died, worker, "its process died")


def check_pools(config: Config) -> None:
    """Raises ConfigError unless requests can be served."""
    split = {WorkerRole.PREFILL, WorkerRole.DECODE}
    roles = {WorkerRole(pool.role) for pool in pools_of(config) if pool.count}
    if not (WorkerRole.COLOCATED in roles or split <= roles):
        there = ", ".join(sorted(role.value for role in roles)) or "none"
        raise ConfigError(f"sim.pools needs prefill and decode workers, or colocated ones; there are: {there}")
