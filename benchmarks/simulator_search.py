"""The highest rate at which nine in ten requests of an excerpt are within their limits, for one cluster and one policy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from benchmarks.simulator_workloads import Limits, Shape, Workload, config_of, excerpt, rate_of
from core.latency import rate_at
from sim.run import simulate
from sim.workload import at_times
from sim.world import World

SHARE = 0.9
HOPELESS = 0.7
"""A run is stopped once its attainment cannot be above this any more."""
STEP = 1.5
STEPS_MAX = 8
UNLOADED = 40
ALONE_S = 60.0
"""Between requests of which each is alone."""
TTFT_SLACK, TBT_SLACK = 6.0, 2.25


@dataclass(frozen=True, slots=True)
class Task:
    workload: Workload
    shape: Shape
    policy: str
    limits: Limits
    data: Path | None
    quick: bool
    guess_rps: float
    halvings: int = 2


@dataclass(frozen=True, slots=True)
class Found:
    """`rate_rps`: of the whole cluster, None when the lowest rate that was tried is too high. `mean_rps`: by mean TPOT.

    `points`: (rate, attainment of TTFT and TBT, of TTFT and mean TPOT, of TTFT alone)."""

    task: Task
    points: tuple[tuple[float, float, float, float], ...]

    @property
    def rate_rps(self) -> float:
        return rate_at([point[:2] for point in self.points], SHARE) or 0.0

    @property
    def mean_rps(self) -> float:
        return rate_at([(point[0], point[2]) for point in self.points], SHARE) or 0.0

    @property
    def per_gpu(self) -> float:
        return self.rate_rps / self.task.shape.gpus

    @property
    def mean_per_gpu(self) -> float:
        return self.mean_rps / self.task.shape.gpus


class _HopelessError(Exception):
    """Too many have missed their limits."""


def bracketed(attained: Callable[[float], float], guess: float, halvings: int, step: float = STEP) -> None:
    """Calls `attained` at rates a factor apart until the share is met at one and missed at the next, then between these two,
    halving in the logarithm."""
    known: dict[float, float] = {}

    def met(rate: float) -> bool:
        known[rate] = attained(rate)
        return known[rate] >= SHARE

    rate, up = guess, met(guess)
    for _ in range(STEPS_MAX):
        rate = rate * step if up else rate / step
        if met(rate) != up:
            break
    else:
        return
    low, high = (rate / step, rate) if up else (rate, rate * step)
    for _ in range(halvings):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if met(middle) else (low, middle)


def search(task: Task) -> Found:
    """Runs simulations; each is of the same requests, at times closer together or farther apart."""
    points: list[tuple[float, float, float, float]] = []

    def attained(rate: float) -> float:
        joint, mean, ttft = attainment(task, rate)
        points.append((rate, joint, mean, ttft))
        return joint

    bracketed(attained, task.guess_rps, task.halvings)
    return Found(task, tuple(sorted(points)))


def attainment(task: Task, rate_rps: float) -> tuple[float, float, float]:
    """Of TTFT and TBT, of TTFT and mean TPOT, of TTFT alone. Of a run that was stopped, what they can be at most."""
    requests = excerpt(task.workload, task.data, task.quick)
    missed_max = (1 - HOPELESS) * len(requests)
    seen: list[World] = []

    def look(world: World) -> None:
        tally = world.users.tally
        if tally.requests - tally.met("joint") > missed_max:
            raise _HopelessError

    try:
        result = simulate(
            config_of(task.shape, task.limits, task.data),
            requests,
            task.policy,
            rate_scale=rate_rps / rate_of(requests),
            prepare=seen.append,
            on_look=look,
        )
    except _HopelessError:
        tally = seen[0].users.tally
        joint, mean, ttft = (
            1 - (tally.requests - tally.met(limits)) / len(requests) for limits in ("joint", "joint_mean", "ttft")
        )
        return joint, mean, ttft
    met = result.report["attainment"]
    return met["joint"], met["joint_mean"], met["ttft"]


@cache
def unloaded(workload: Workload, data: Path | None, quick: bool) -> tuple[float, float, float]:
    """Means of TTFT, TBT and mean TPOT, each request alone on one machine that computes prompts in one go."""
    requests = excerpt(workload, data, quick)
    some = [*requests[:: max(1, len(requests) // UNLOADED)]]
    config = config_of(Shape(0, 0, 1, chunk=1 << 20), None, data)
    alone = simulate(config, at_times(some, (ALONE_S * n for n in range(len(some)))), "least_load").report
    return tuple(alone[kind]["mean"] or 0.0 for kind in ("ttft_s", "tbt_s", "tpot_s"))  # type: ignore[return-value]
