"""Carries out what the autoscaler decides: through the reconciler, and with a word to whoever provides machines."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from cluster.autoscale import Autoscaler, Bounds, Change, Flip, Grow, Retire
from cluster.launcher import Launcher
from cluster.reconcile import POOL_ROLES, Reconciler
from core.config import ClusterConfig
from core.report import WorkerReport
from core.request import WorkerRole

log = logging.getLogger(__name__)

RETIRE_S = 600.0
"""Until a worker that was retired is ended whatever it still does."""
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

    def __init__(self, config: ClusterConfig, least: Mapping[WorkerRole, int]) -> None:
        roles = {role: count for role, count in least.items() if role in POOL_ROLES and count}
        self._scaler = Autoscaler(Bounds(roles, config.autoscale_max, config.autoscale_quiet_s, START_S))
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
                    if reconciler.retire(worker_id, now + RETIRE_S):
                        done.append(change)
                case Flip(worker_id, role):
                    if refusal := reconciler.set_role(worker_id, role):
                        log.info("%s stays: %s", worker_id, refusal)
                    else:
                        done.append(change)
        if done and isinstance(launcher, ProvidesMachines):
            self._asking = asyncio.create_task(launcher.want(dict(reconciler.desired)), name="ask for machines")
        return done
