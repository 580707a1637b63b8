"""Carries out what the autoscaler decides: through the reconciler, and with a word to whoever provides machines."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from cluster.autoscale import Autoscaler, Bounds, Change, Flip, Grow, Retire
from cluster.demand import DemandPlanner, Terms
from cluster.launcher import Launcher
from cluster.reconcile import POOL_ROLES, Reconciler
from core.config import Config
from core.report import WorkerReport
from core.request import Slo, WorkerRole

log = logging.getLogger(__name__)

MARGIN_S = 5.0
ASSUMED_TTFT_S, ASSUMED_TBT_S = 5.0, 0.25
"""Of a default class without limits."""
START_S = 15.0
"""How far ahead load is looked at, until workers have been seen to start."""


@runtime_checkable
class ProvidesMachines(Protocol):
    """A launcher behind which a cluster grows with what is asked for."""

    async def want(self, workers: Mapping[WorkerRole, int]) -> None:
        """So many workers of each role are to have a place. Never raises for machines that do not come."""
        ...


class Scaling:
    """One per controller, on its loop."""

    def __init__(self, config: Config, least: Mapping[WorkerRole, int]) -> None:
        roles = {role: count for role, count in least.items() if role in POOL_ROLES and count}
        cluster = config.cluster
        self.retire_s = retire_s(config)
        bounds = Bounds(roles, cluster.autoscale_max, cluster.autoscale_quiet_s, START_S)
        self._scaler = Autoscaler(bounds, DemandPlanner(terms_of(config)))
        self._asking: asyncio.Task[None] | None = None

    def decide(self, reports: Sequence[WorkerReport], reconciler: Reconciler, launcher: Launcher, now: float) -> list[Change]:
        """The changes that were taken up."""
        done: list[Change] = []
        for change in self._scaler.decide(reports, reconciler.desired, now):
            match change:
                case Grow(role):
                    reconciler.grow(role)
                    done.append(change)
                case Retire(worker_id):
                    if reconciler.retire(worker_id, now + self.retire_s):
                        done.append(change)
                case Flip(worker_id, role):
                    if refusal := reconciler.set_role(worker_id, role):
                        log.info("%s stays: %s", worker_id, refusal)
                    else:
                        done.append(change)
        if done and isinstance(launcher, ProvidesMachines):
            self._asking = asyncio.create_task(launcher.want(dict(reconciler.desired)), name="ask for machines")
        return done


def retire_s(config: Config) -> float:
    """Until a worker that was retired is ended whatever it still holds. A request that it has begins no later than its
    retirement and lasts no longer than `router.request_timeout_s`; what it exports then is kept for a lease beyond that. So
    nothing that anybody still wants is dropped, unless worker and routers disagree about the time."""
    return config.router.request_timeout_s + config.transfer.lease_s + config.router.session_lease_s + MARGIN_S


def terms_of(config: Config) -> Terms:
    """Pools are planned for the limits of the class that requests without one have."""
    limits = config.router.classes[config.router.default_class]
    slo = Slo(ttft_s=limits.ttft_s or ASSUMED_TTFT_S, tbt_s=limits.tbt_s or ASSUMED_TBT_S)
    return Terms(slo, config.engine.max_step_tokens, config.cluster.autoscale_max)
