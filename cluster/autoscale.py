"""When a pool wants one worker more or less, and which: scaling and flips while a cluster serves. Deciding code.

A pool wants the larger of two numbers. One is planned for the requests that are expected, by rate and lengths (`demand`): it
knows the limits, and what comes before it has come. The other is what the workers' reports say: a pool's load, in workers, is
forecast over the time that a new worker takes to start, with head-room, and each is to be busy to `TARGET`; it knows what
closed forms leave out. Damped three times: growth must be wanted
for `GROW_HOLD_S`, shrinking for `quiet_s`, and after a change nothing more happens to the pool until that one is done. Where
one pool has a worker too many and the other one too few, that worker changes its role instead. Who leaves is drained: it takes
no new work, and stays until its requests are done and nobody reads blocks of it any more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.demand import DemandPlanner
from cluster.forecast import Forecast
from core.report import WorkerReport, WorkerState
from core.request import WorkerRole

TARGET = 0.7
GROW_HOLD_S = 1.0
FLIP_HOLD_S = 10.0
BACKLOG_S = 1.0
"""Prompts waiting for so long keep a prefill worker fully in use."""
WAITING = 4
"""Where a worker does not know yet what its steps cost: prompts waiting that do the same."""
MEMORY = 0.85
"""KV in use that fills a decode worker: the rest is for what running requests still grow by."""


@dataclass(frozen=True, slots=True)
class Grow:
    role: WorkerRole
    reason: str


@dataclass(frozen=True, slots=True)
class Retire:
    worker_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Flip:
    worker_id: str
    role: WorkerRole
    reason: str


Change = Grow | Retire | Flip


@dataclass(frozen=True, slots=True)
class Bounds:
    """Workers per role: `least` and `most`. `start_s`: what a new worker takes until it serves."""

    least: Mapping[WorkerRole, int]
    most: int
    quiet_s: float
    start_s: float


def in_use(report: WorkerReport, role: WorkerRole) -> float:
    """1: as much as it bears; more where work waits."""
    cost = report.step_cost.cost if report.step_cost is not None else None
    backlog = cost.prefill_token_s * report.waiting_tokens / BACKLOG_S if cost is not None else report.waiting / WAITING
    busy = 1.0 if report.running and role is WorkerRole.PREFILL else 0.0
    memory = report.blocks.active / report.blocks.total / MEMORY if report.blocks.total else 0.0
    if role is WorkerRole.PREFILL:
        return busy * TARGET + backlog
    waits = report.waiting / WAITING if role is WorkerRole.DECODE else backlog
    return max(memory, 0.0) + waits


class Autoscaler:
    """Asked a few times per second with every report there is."""

    def __init__(self, bounds: Bounds, planner: DemandPlanner | None = None) -> None:
        self._bounds = bounds
        self._planner = planner
        self._forecasts = {role: Forecast() for role in bounds.least}
        self._over: dict[WorkerRole, float] = {}  # since when a pool is too large
        self._under: dict[WorkerRole, float] = {}  # … or too small

    def decide(self, reports: Sequence[WorkerReport], desired: Mapping[WorkerRole, int], now: float) -> list[Change]:
        """One change per pool at most. `desired`: workers of each role as they are to be, those that start included."""
        changes: list[Change] = []
        ready = {
            role: [one for one in reports if one.role is role and one.state is WorkerState.READY] for role in self._forecasts
        }
        planned = self._planner.planned(reports, desired, self._bounds.start_s, now) if self._planner is not None else {}
        wanted = {role: self._wanted(role, ready[role], planned.get(role, 0), now) for role in self._forecasts}
        self._note(wanted, desired, now)
        flip = self._flip(ready, desired, now)
        if flip is not None:
            self._over.clear()
            self._under.clear()
            return [flip]
        for role, workers in ready.items():
            count = desired.get(role, 0)
            if len(workers) != count:  # a change is under way, or somebody died: its effect comes first
                continue
            load = self._forecasts[role].level
            grows = self._for(self._under, role, now) >= GROW_HOLD_S and not self._gets_one(role, desired)
            if grows and count < self._bounds.most:
                said = f"; {self._planner.said}" if self._planner is not None and self._planner.said else ""
                changes.append(Grow(role, f"{count} {role.value} workers carry {load:.1f}, {wanted[role]} are wanted{said}"))
                self._under.pop(role, None)
            elif self._for(self._over, role, now) >= self._bounds.quiet_s and count > self._bounds.least[role]:
                victim = _idlest(workers)
                changes.append(Retire(victim.worker_id, f"{wanted[role]} of {count} {role.value} workers are enough"))
                self._over.pop(role, None)
        return changes

    def _wanted(self, role: WorkerRole, workers: Sequence[WorkerReport], planned: int, now: float) -> int:
        self._forecasts[role].observe(sum(in_use(one, role) for one in workers), now)
        expected = self._forecasts[role].upper(self._bounds.start_s)
        return min(max(self._bounds.least[role], planned, math.ceil(expected / TARGET - 0.05)), self._bounds.most)

    def _note(self, wanted: Mapping[WorkerRole, int], desired: Mapping[WorkerRole, int], now: float) -> None:
        """Since when each pool is too small, or too large."""
        for role, count in wanted.items():
            there = desired.get(role, 0)
            for apart, since in ((count > there, self._under), (count < there, self._over)):
                if apart and there:
                    since.setdefault(role, now)
                else:
                    since.pop(role, None)

    def _flip(
        self, ready: Mapping[WorkerRole, Sequence[WorkerReport]], desired: Mapping[WorkerRole, int], now: float
    ) -> Flip | None:
        """Sooner than waiting for one pool's quiet: a worker that is there serves at once."""
        for giver, taker in ((WorkerRole.PREFILL, WorkerRole.DECODE), (WorkerRole.DECODE, WorkerRole.PREFILL)):
            whole = all(len(ready.get(role, ())) == desired.get(role, 0) for role in (giver, taker))
            hold_s = min(FLIP_HOLD_S, self._bounds.quiet_s)
            apart = self._for(self._over, giver, now) >= hold_s and self._for(self._under, taker, now) >= GROW_HOLD_S
            if whole and apart and desired.get(giver, 0) > self._bounds.least.get(giver, 1):
                reason = f"{taker.value} wants a worker more, {giver.value} one less"
                return Flip(_idlest(ready[giver]).worker_id, taker, reason)
        return None

    def _gets_one(self, role: WorkerRole, desired: Mapping[WorkerRole, int]) -> bool:
        """The other side may have one to give: worth waiting for, it starts nothing and costs nothing."""
        other = {WorkerRole.PREFILL: WorkerRole.DECODE, WorkerRole.DECODE: WorkerRole.PREFILL}.get(role)
        return other in self._over and desired.get(other, 0) > self._bounds.least[other]

    @staticmethod
    def _for(since: Mapping[WorkerRole, float], role: WorkerRole, now: float) -> float:
        return now - since[role] if role in since else -1.0


def _idlest(workers: Sequence[WorkerReport]) -> WorkerReport:
    """Whose going costs least: fewest requests, then fewest blocks that others still read, then the youngest."""
    return min(
        workers, key=lambda one: (one.running + one.waiting, one.leases_open, -int(one.worker_id.rpartition("-")[2] or 0))
    )
