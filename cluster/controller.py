"""Drives the cluster: carries out what the reconciler decides and feeds back what launchers and workers say."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import NamedTuple

from cluster.autoscale import Retire
from cluster.host import Ended
from cluster.launcher import Handle, Launcher
from cluster.membership import Membership
from cluster.reconcile import Command, Forget, GiveUp, Launch, Reconciler, RestartPolicy, Stop
from cluster.report import ClusterSnapshot
from cluster.scaling import Scaling
from core.clock import Clock, SystemClock
from core.config import ClusterConfig, Config
from core.errors import ConfigError, NotFoundError
from core.hostspec import HostSpec
from core.report import RoleProposal, WorkerReport, WorkerState
from core.request import WorkerRole

log = logging.getLogger(__name__)

LAUNCH_TIMEOUT_S = 120.0
WORKER_STOP_S = 2.0
TANDEM_VERSION = version("tandem")


def worker_grace_s(grace_s: float) -> float:
    """The workers' part of the grace time, after the router has ended: nothing runs on them any more."""
    return min(WORKER_STOP_S, grace_s / 2)


def desired_of(config: Config) -> dict[WorkerRole, int]:
    """Workers of each role; raises ConfigError for pools that cannot serve a request."""
    cluster = config.cluster
    if bool(cluster.prefill) != bool(cluster.decode):
        raise ConfigError(
            f"split pools need both kinds of workers: got prefill={cluster.prefill}, decode={cluster.decode}; "
            "give each at least 1, or both 0 and colocated at least 1"
        )
    if not cluster.prefill + cluster.colocated:
        raise ConfigError("there is no worker: set prefill and decode to at least 1 each, or colocated to at least 1")
    return {
        WorkerRole.ROUTER: cluster.routers,
        WorkerRole.STORE: config.store.nodes,
        WorkerRole.PREFILL: cluster.prefill,
        WorkerRole.DECODE: cluster.decode,
        WorkerRole.COLOCATED: cluster.colocated,
    }


def _counted_up(address: str, number: int) -> str:
    """The address with a port higher by `number`; port 0 stays, it picks a free one."""
    host, _, port = address.rpartition(":")
    return f"{host}:{int(port) + number}" if int(port) else address


def suspect_after_s(cluster: ClusterConfig) -> float:
    """Three heartbeats missed, when that is well before death; one and a half when heartbeats are rare."""
    early = min(3 * cluster.heartbeat_s, cluster.dead_after_s / 2)
    return min(max(early, 1.5 * cluster.heartbeat_s), cluster.dead_after_s)


class Orders(NamedTuple):
    """To a worker, in answer to its report; None: nothing."""

    drain_s: float | None = None
    role: WorkerRole | None = None


class Controller:
    """Owns membership, reconciler and the handles of what runs. All methods on one asyncio loop.

    `run()` is the control loop and lives until cancelled; it raises ConfigError when the cluster cannot come up.
    """

    def __init__(
        self, config: Config, launcher: Launcher, desired: Mapping[WorkerRole, int], clock: Clock | None = None
    ) -> None:
        cluster = config.cluster
        self.address = ""
        """Where workers report to; set before `run`."""
        self.gone: Callable[[str, int], None] = lambda worker_id, epoch: None
        """Hears of every incarnation that ended or was given up. Must return at once."""
        self._config = config
        self._launcher = launcher
        self._clock = clock or SystemClock()
        self._membership = Membership(suspect_after_s(cluster), cluster.dead_after_s)
        policy = RestartPolicy(start_timeout_s=cluster.start_timeout_s, grace_s=cluster.grace_s)
        self._reconciler = Reconciler(desired, policy)
        self._scaling = Scaling(config, desired) if cluster.autoscale == "auto" else None
        self._lives: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._handles: dict[tuple[str, int], Handle] = {}
        self._stops: set[asyncio.Task[None]] = set()
        self._routers_at: dict[str, dict[str, str]] = {}
        self._drains: dict[tuple[str, int], float] = {}  # → deadline
        self._wake = asyncio.Event()
        self._changed = asyncio.Event()
        self._announced = -1
        self.ready = asyncio.Event()
        """Set when every pool has been complete for the first time."""

    # ---- what the service calls ----------------------------------------------------------------------------------

    def reported(self, report: WorkerReport) -> Orders:
        """Takes a report in; what the worker is to do. Raises StaleEpochError."""
        now = self._clock.now()
        if self._membership.report(report, now) and report.state is WorkerState.READY:
            self._keep_address(report)
            self._reconciler.ready(report.worker_id, report.epoch, now)
            self._wake.set()
        if report.proposal is not None and self._config.cluster.role_changes == "auto":
            self._follow(report.proposal)
        if report.state is WorkerState.DRAINING and report.idle:
            self._reconciler.drained(report.worker_id, report.epoch, now)
            self._wake.set()
        self._announce()
        deadline = self._drains.get((report.worker_id, report.epoch))
        role = self._reconciler.role_of(report.worker_id, report.epoch)
        return Orders(
            None if deadline is None else max(0.0, deadline - now),
            None if role is report.role else role,
        )

    def set_role(self, target: str, role: WorkerRole) -> str:
        """Has a ready worker play `role`; what it holds it keeps. Raises NotFoundError, ConfigError."""
        report = self.snapshot().find(target)
        if report is None:
            raise NotFoundError(f"no worker {target}; `tandem status` lists them")
        if report.role is role:
            return f"{target} is a {role.value} worker already"
        if refusal := self._reconciler.set_role(target, role):
            raise ConfigError(refusal)
        log.info("%s is to play %s instead of %s", target, role.value, report.role.value)
        return f"{target} plays {role.value} within {self._config.cluster.heartbeat_s:g} s and keeps what it holds"

    def _follow(self, proposal: RoleProposal) -> None:
        """A router says the same until it sees it done, or something changes; what cannot be is not done."""
        worker = self.snapshot().find(proposal.target)
        if worker is None or self._reconciler.role_of(worker.worker_id, worker.epoch) is proposal.role:
            return
        refusal = self._reconciler.set_role(proposal.target, proposal.role)
        log.info("%s to %s, as %s: %s", proposal.target, proposal.role.value, proposal.reason, refusal or "done")

    def drain(self, target: str, deadline_s: float) -> str:
        """Asks one worker to finish within `deadline_s` and starts its successor. Raises NotFoundError, ConfigError."""
        now = self._clock.now()
        report = self.snapshot().find(target)
        if report is None:
            raise NotFoundError(f"no worker {target}; `tandem status` lists them")
        if report.role is WorkerRole.ROUTER and (self._config.cluster.routers == 1 or not self._config.router.share_address):
            raise ConfigError(f"nobody else serves the addresses of {target}, so it cannot be drained; use `tandem down`")
        if not self._reconciler.drain(target, now + deadline_s):
            raise ConfigError(f"{target} is {report.state.value}; only a ready worker can be drained")
        self._drains[target, report.epoch] = now + deadline_s
        self._membership.mark_draining(target)
        self._announce()
        self._wake.set()
        return f"{target} takes no new work and ends within {deadline_s:g} s; a successor is starting"

    def snapshot(self) -> ClusterSnapshot:
        return self._membership.snapshot(self._clock.now(), self._model(), TANDEM_VERSION)

    async def changed(self, version: int, timeout_s: float) -> ClusterSnapshot:
        """The next snapshot newer than `version`, or the current one after `timeout_s`."""
        if self._membership.version == version:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._changed.wait()
            except TimeoutError:
                pass
        return self.snapshot()

    # ---- the control loop ----------------------------------------------------------------------------------------

    async def run(self) -> None:
        while True:
            now = self._clock.now()
            for worker_id, epoch in self._membership.tick(now):
                log.warning("%s@%d fell silent", worker_id, epoch)
                self.gone(worker_id, epoch)
                self._reconciler.silent(worker_id, epoch, now)
            if self._scaling is not None and self._reconciler.was_ready:
                self._scale(self._scaling, now)
            for command in self._reconciler.plan(now):
                self._carry_out(command)
            if self._reconciler.was_ready:
                self.ready.set()
            self._announce()
            await self._pause(now)

    def _scale(self, scaling: Scaling, now: float) -> None:
        """What the load asks for, through the same doors as an operator: who leaves finishes first."""
        reports = [member.report for member in self.snapshot().members]
        try:
            changes = scaling.decide(reports, self._reconciler, self._launcher, now)
        except Exception:  # a plan is no reason to end a cluster that serves
            log.exception("pools stay as they are, and are not scaled any more: planning for the load failed; please report it")
            self._scaling = None
            return
        for change in changes:
            if isinstance(change, Retire):
                report = self.snapshot().find(change.worker_id)
                assert report is not None, "it was chosen among the reports"
                self._drains[change.worker_id, report.epoch] = now + scaling.retire_s
                self._membership.mark_draining(change.worker_id)
            log.info("%s", change)

    async def _pause(self, now: float) -> None:
        """Until something happens, the reconciler wants to act, or silence has to be judged again."""
        wake_at = self._reconciler.wake_at()
        longest_s = min(self._config.cluster.heartbeat_s, self._config.cluster.dead_after_s / 5)
        pause_s = longest_s if wake_at is None else min(longest_s, max(0.001, wake_at - now))
        try:
            async with asyncio.timeout(pause_s):
                await self._wake.wait()
        except TimeoutError:
            pass
        self._wake.clear()

    def _carry_out(self, command: Command) -> None:
        match command:
            case Launch(worker_id, role, epoch):
                spec = self._spec(worker_id, role, epoch)
                self._membership.expect(worker_id, role, epoch, spec.node, self._clock.now())
                life = asyncio.create_task(self._live(spec), name=f"life of {worker_id}@{epoch}")
                self._lives[worker_id, epoch] = life
            case Stop(worker_id, epoch, grace_s, reason):
                log.info("stopping %s@%d: %s", worker_id, epoch, reason)
                stop = asyncio.create_task(self._stop(worker_id, epoch, grace_s), name=f"stop {worker_id}@{epoch}")
                self._stops.add(stop)
                stop.add_done_callback(self._stops.discard)
            case Forget(worker_id):
                self._membership.forget(worker_id)
            case GiveUp(reason):
                raise ConfigError(reason)

    async def _live(self, spec: HostSpec) -> None:
        """One incarnation from launch to end."""
        name = (spec.worker_id, spec.epoch)
        ended = Ended("it was never launched")
        try:
            log.info("starting %s@%d", *name)
            async with asyncio.timeout(LAUNCH_TIMEOUT_S):
                self._handles[name] = await self._launcher.launch(spec)
            ended = await asyncio.shield(self._handles[name].exited)
        except TimeoutError:
            ended = Ended(f"the launcher did not start it within {LAUNCH_TIMEOUT_S:g} s")
        except ConfigError as error:
            ended = Ended(str(error), permanent=True)
        except OSError as error:
            ended = Ended(f"it could not be launched: {error}")
        finally:
            self._handles.pop(name, None)
            self._lives.pop(name, None)
            self._drains.pop(name, None)
        log.info("%s@%d is gone: %s", *name, ended.reason)
        self._membership.mark_dead(*name, ended.reason)
        self.gone(*name)
        self._reconciler.ended(*name, ended.reason, ended.permanent, self._clock.now())
        self._announce()
        self._wake.set()

    async def _stop(self, worker_id: str, epoch: int, grace_s: float) -> None:
        handle = self._handles.get((worker_id, epoch))
        if handle is not None:
            await handle.stop(grace_s)

    async def stop_all(self, grace_s: float) -> None:
        """Ends everything within `grace_s`: the router first, so that what runs may finish on workers that still do.

        Call after `run` was cancelled.
        """
        handles = list(self._handles.items())
        routers = [handle for (name, _), handle in handles if name.startswith(WorkerRole.ROUTER.value)]
        workers = [handle for _, handle in handles if handle not in routers]
        worker_s = worker_grace_s(grace_s)
        await asyncio.gather(*(handle.stop(max(0.0, grace_s - worker_s)) for handle in routers))
        await asyncio.gather(*(handle.stop(worker_s) for handle in workers))
        for task in (*self._lives.values(), *self._stops):
            task.cancel()
        await asyncio.gather(*self._lives.values(), *self._stops, return_exceptions=True)

    # ---- helpers -------------------------------------------------------------------------------------------------

    def _spec(self, worker_id: str, role: WorkerRole, epoch: int) -> HostSpec:
        config = self._config
        if role is WorkerRole.ROUTER:  # it ends first, and leaves the workers their part of the grace time
            grace_s = config.cluster.grace_s
            cluster = config.cluster.model_copy(update={"grace_s": grace_s - worker_grace_s(grace_s)})
            router = config.router.model_copy(update=self._router_addresses(worker_id))
            config = config.model_copy(update={"cluster": cluster, "router": router})
        return HostSpec(worker_id, role, epoch, config, self.address)

    def _keep_address(self, report: WorkerReport) -> None:
        """A router's successor listens where clients already connect, also when the first port was free to choose."""
        if report.role is WorkerRole.ROUTER and report.grpc_address:
            http = {"http": report.http_address} if report.http_address else {}
            self._routers_at[report.worker_id] = {"grpc": report.grpc_address, **http}

    def _router_addresses(self, worker_id: str) -> dict[str, str]:
        """Where it is to listen: all routers at the same ports, or each at its own, counted up from those configured."""
        router = self._config.router
        if worker_id in self._routers_at:
            return self._routers_at[worker_id]
        number = 0 if router.share_address else int(worker_id.rpartition("-")[2])
        return {name: _counted_up(address, number) for name, address in (("grpc", router.grpc), ("http", router.http))}

    def _model(self) -> str:
        config = self._config.model
        return config.name or config.path.rstrip("/").rpartition("/")[2]

    def _announce(self) -> None:
        """Wakes watchers when the version moved."""
        if self._membership.version != self._announced:
            self._announced = self._membership.version
            self._changed.set()
            self._changed = asyncio.Event()
