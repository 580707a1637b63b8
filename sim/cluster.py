"""The controller on virtual time: the shipped membership and reconciler, a launcher that takes its time, snapshots."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import MappingProxyType

from cluster.membership import Membership
from cluster.reconcile import Forget, GiveUp, Launch, Reconciler, RestartPolicy, Stop
from core.config import ClusterConfig, Config, EngineConfig
from core.cost_model import CostModel, LinkCost
from core.errors import StaleEpochError
from core.report import WorkerReport, WorkerState
from core.request import WorkerRole
from core.sim_config import PoolConfig
from router.view import ClusterView, WorkerView
from router.watch import worker_view
from sim.replica import Replica, replica_of
from sim.router import SimRouter
from sim.site import Site
from sim.worker import SimWorker

CONTROLLER = "controller"
LOOK_S = 0.5
"""How often workers look whether their reports changed (`core.reporter`); here they look together."""
SNAPSHOT_GAP_S = 0.02
"""Between two snapshots, at least (`cluster.service`)."""


class Pools:
    """Which pool the worker of a slot belongs to: slots of a role are dealt to its pools in order."""

    def __init__(self, config: Config, model: CostModel | None = None) -> None:
        """`model`: of all of them, in place of what the configuration names."""
        self._of: dict[WorkerRole, list[tuple[PoolConfig, Replica]]] = {}
        self.desired: dict[WorkerRole, int] = {}
        for pool in pools_of(config):
            role = WorkerRole(pool.role)
            if pool.count:
                self._of.setdefault(role, []).extend([(pool, replica_of(config, pool, model))] * pool.count)
                self.desired[role] = self.desired.get(role, 0) + pool.count

    def of(self, name: str, role: WorkerRole) -> tuple[PoolConfig, Replica]:
        """A worker that plays another role, or is one more than were planned, is like the last of those."""
        known = self._of.get(WorkerRole(name.rpartition("-")[0])) or self._of[role]
        return known[min(int(name.rpartition("-")[2]), len(known) - 1)]

    def believe(self, change: Callable[[int, Replica], Replica]) -> None:
        """Before time begins: what each worker of a role (by its number) is to be, say one that reports a wrong cost."""
        for role, known in self._of.items():
            self._of[role] = [(pool, change(number, replica)) for number, (pool, replica) in enumerate(known)]

    def all(self) -> list[tuple[PoolConfig, Replica]]:
        return [each for role in self._of.values() for each in role]


def pools_of(config: Config) -> tuple[PoolConfig, ...]:
    """Those of `sim.pools`, else what `cluster` says."""
    if config.sim.pools:
        return config.sim.pools
    counts = {"prefill": config.cluster.prefill, "decode": config.cluster.decode, "colocated": config.cluster.colocated}
    return tuple(PoolConfig.model_validate({"role": role, "count": count}) for role, count in counts.items() if count)


def worker_names(config: Config) -> list[str]:
    """Of the workers that are there when time begins."""
    counts: dict[str, int] = {}
    for pool in pools_of(config):
        counts[pool.role] = counts.get(pool.role, 0) + pool.count
    return [f"{role}-{n}" for role, count in counts.items() for n in range(count)]


def spot_names(config: Config) -> list[str]:
    """Of those, whom a trace of spot instances may take away: the ones of spot markets, or all where no pool is of one."""
    counts: dict[str, int] = {}
    spot: list[str] = []
    for pool in pools_of(config):
        first = counts.get(pool.role, 0)
        counts[pool.role] = first + pool.count
        if pool.market == "spot":
            spot += [f"{pool.role}-{n}" for n in range(first, first + pool.count)]
    return spot or worker_names(config)


class SimController:
    def __init__(self, site: Site, pools: Pools, lost: random.Random) -> None:
        config: ClusterConfig = site.config.cluster
        self.reports_lost = 0.0
        """Part of all reports that never arrives."""
        self._empty: dict[str, Launch | None] = {}  # places that stay empty for now, and who is to start there
        self._away: dict[str, tuple[WorkerRole, float]] = {}  # who is gone from them, since when
        self._saved_usd = 0.0
        self.on_death: Callable[[SimWorker], None] = lambda worker: None
        self._site = site
        self._pools = pools
        self._draw = lost
        early = min(3 * config.heartbeat_s, config.dead_after_s / 2)
        self._membership = Membership(min(max(early, 1.5 * config.heartbeat_s), config.dead_after_s), config.dead_after_s)
        self._reconciler = Reconciler(pools.desired, RestartPolicy(config.start_timeout_s, config.grace_s))
        self._routers: list[SimRouter] = []
        self._said: dict[str, float] = {}
        self._sequence: dict[str, int] = {}
        self._views: dict[str, tuple[WorkerReport, WorkerView]] = {}
        self._announced = -1
        self._told_at = -1.0
        self._telling = False

    def start(self, routers: list[SimRouter]) -> None:
        """Everybody is there and known when time begins."""
        self._routers = routers
        self._control(start_s=0.0)
        self._site.events.later(0.0, self._look)
        self._site.events.later(1.0, self._tick)

    # ---- workers ---------------------------------------------------------------------------------------------------

    def _launch(self, command: Launch, start_s: float) -> None:
        now = self._site.events.now()
        self._membership.expect(command.worker_id, command.role, command.epoch, command.worker_id, now)
        self._site.events.later(start_s, lambda: self._started(command))

    def _started(self, command: Launch) -> None:
        name, site = command.worker_id, self._site
        slot = self._reconciler.slots.get(name)
        if slot is None or slot.epoch != command.epoch:
            return
        pool, replica = self._pools.of(name, command.role)
        worker = SimWorker(name, command.role, command.epoch, site, replica, _engine(site.config.engine, pool))
        site.workers[name] = worker
        self._sequence[name] = 0
        self._send(self._report(worker))

    def died(self, worker: SimWorker, reason: str) -> None:
        """The process is gone; the launcher that watches it says so."""
        now = self._site.events.now()
        if worker.name in self._empty:
            self._away.setdefault(worker.name, (worker.role, now))
        self._membership.mark_dead(worker.name, worker.epoch, reason)
        self._departed(worker.name, worker.epoch)
        self._reconciler.ended(worker.name, worker.epoch, reason, False, now)
        self._control()

    def _departed(self, name: str, epoch: int) -> None:
        if self._site.plane is not None:
            self._site.plane.departed(name, epoch)

    def drain(self, worker: SimWorker, deadline: float) -> None:
        """It gets no new work, and a successor starts, unless its place is to stay empty."""
        if worker.name in self._empty or self._reconciler.drain(worker.name, deadline):
            self._membership.mark_draining(worker.name)
            worker.state = WorkerState.DRAINING
            self._control()

    def leave_empty(self, name: str) -> None:
        """Nobody takes its place until `refill`."""
        self._empty.setdefault(name, None)

    def saved_usd(self, until: float) -> float:
        """What machines that had been taken away did not cost, by that time."""
        return self._saved_usd + sum(self._unpaid_usd(name, until) for name in self._away)

    def _unpaid_usd(self, name: str, until: float) -> float:
        role, since = self._away[name]
        return self._pools.of(name, role)[1].usd_per_hour * max(0.0, until - since) / 3600

    def refill(self, name: str) -> None:
        if name in self._away:
            self._saved_usd += self._unpaid_usd(name, self._site.events.now())
            del self._away[name]
        waiting = self._empty.pop(name, None)
        if waiting is not None:
            self._launch(waiting, self._site.config.sim.start_s)

    def _look(self) -> None:
        """Reports of all workers that have something new to say, or have been silent for a heartbeat."""
        now, heartbeat_s = self._site.events.now(), self._site.config.cluster.heartbeat_s
        reports = []
        for worker in self._site.workers.values():
            if worker.alive:
                said = self._said.get(worker.name)
                due = said is None or now - said >= heartbeat_s - 1e-9
                if due or worker.changed:
                    reports += self._report(worker)
        self._send(reports)
        self._site.events.later(LOOK_S, self._look)

    def _report(self, worker: SimWorker) -> list[WorkerReport]:
        """What it says now; nothing where that is lost on the way."""
        name = worker.name
        worker.changed = False
        self._sequence[name] += 1
        report = worker.report(self._sequence[name])
        self._said[name] = self._site.events.now()
        return [] if self.reports_lost and self._draw.random() < self.reports_lost else [report]

    def _send(self, reports: list[WorkerReport]) -> None:
        """Those of one look arrive together."""
        if not reports:
            return
        delay_s = self._site.config.sim.report_delay_s
        if delay_s:
            self._site.events.at(self._site.events.now() + delay_s, self._post, reports)
        else:
            self._post(reports)

    def _post(self, reports: list[WorkerReport]) -> None:
        post = self._site.post
        reports = [report for report in reports if post.together(report.worker_id, CONTROLLER)]
        if reports:
            post.send(CONTROLLER, CONTROLLER, self._reported, reports)

    def _reported(self, reports: list[WorkerReport]) -> None:
        for report in reports:
            self._heard(report)
        self._announce()

    def _heard(self, report: WorkerReport) -> None:
        now = self._site.events.now()
        try:
            changed = self._membership.report(report, now)
        except StaleEpochError:
            worker = self._site.find(report.worker_id, report.epoch)
            if worker is not None:  # it was given up: it must end
                self._end(worker)
            return
        if changed and report.state is WorkerState.READY:
            self._reconciler.ready(report.worker_id, report.epoch, now)
        if report.state is WorkerState.DRAINING and report.idle:
            self._reconciler.drained(report.worker_id, report.epoch, now)
            self._control()

    def _end(self, worker: SimWorker) -> None:
        self.on_death(worker)

    # ---- the control loop ------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        now = self._site.events.now()
        for name, epoch in self._membership.tick(now):
            self._departed(name, epoch)
            self._reconciler.silent(name, epoch, now)
        self._control()
        self._site.events.later(
            min(self._site.config.cluster.heartbeat_s, self._site.config.cluster.dead_after_s / 5), self._tick
        )

    def _control(self, start_s: float | None = None) -> None:
        site = self._site
        for command in self._reconciler.plan(site.events.now()):
            match command:
                case Launch(name) if name in self._empty:
                    self._empty[name] = command
                case Launch():
                    self._launch(command, site.config.sim.start_s if start_s is None else start_s)
                case Stop(name, epoch):
                    worker = site.find(name, epoch)
                    if worker is not None and site.post.together(name, CONTROLLER):
                        self._end(worker)
                    self._reconciler.ended(name, epoch, command.reason, False, site.events.now())
                case Forget(name):
                    self._membership.forget(name)
                case GiveUp():
                    pass  # a cluster whose workers are killed before it was ready tries on
        self._announce()

    # ---- routers ---------------------------------------------------------------------------------------------------

    def _announce(self) -> None:
        if self._membership.version != self._announced and not self._telling:
            self._telling = True
            now = self._site.events.now()
            self._site.events.at(max(now, self._told_at + SNAPSHOT_GAP_S), self._tell)

    def _tell(self) -> None:
        now = self._site.events.now()
        self._telling = False
        self._announced, self._told_at = self._membership.version, now
        view = self._view(now)
        for router in self._routers:
            self._site.post.send(CONTROLLER, router.name, router.follow, view)

    def _view(self, now: float) -> ClusterView:
        snapshot = self._membership.snapshot(now)
        views: dict[str, WorkerView] = {}
        for member in snapshot.members:
            name = member.report.worker_id
            known = self._views.get(name)
            if known is None or known[0] is not member.report or known[1].age_s != member.age_s:
                self._views[name] = known = (member.report, worker_view(member.report, member.age_s))
            views[name] = known[1]
        links = self._site.config.sim.links
        return ClusterView(snapshot.version, MappingProxyType(views), LinkCost(links.latency, float(links.bandwidth)))


def _engine(config: EngineConfig, pool: PoolConfig) -> EngineConfig:
    return config if pool.max_step_tokens is None else config.model_copy(update={"max_step_tokens": pool.max_step_tokens})
