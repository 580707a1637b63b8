"""FastServe's toy example through the shipped `mlfq` order (`router/order.py`).

Wu et al. (section 4.1) compare four schedules of three jobs that come together: mean latencies of 4.23 (first come),
5 (multi-level feedback queue), 3.3 (skip-join) and 3 (shortest remaining time). The jobs themselves are in no source that we
could open, so `JOBS` was found by search: with decodes of one quantum, these give all four figures. The first and the last
follow from the sizes alone; that the two in between come out too is what the shipped order has to do.

The order demotes nobody by itself, because requests run here until they end. Here a driver plays an engine that stops after
each quantum: who is not done enters again, one level further down.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean

from router.order import QUANTUM_S, Fcfs, Mlfq, Order, Waiting

UNIT_S = 5 * QUANTUM_S
"""Of the jobs below, so that the shortest step, 0.2, is the first level's quantum."""
PUBLISHED = {"fcfs": 4.23, "mlfq": 5.0, "skip-join": 3.3, "srpt": 3.0}


@dataclass(frozen=True, slots=True)
class Job:
    prefill: float
    decodes: int
    decode: float = 0.2

    @property
    def steps(self) -> list[float]:
        return [self.prefill] + [self.decode] * self.decodes


JOBS = (Job(3.0, 1), Job(0.4, 0), Job(2.1, 1))


def latencies() -> dict[str, float]:
    """Mean latency of each schedule, in the example's units."""
    return {
        "fcfs": _mean(Fcfs, _to_the_end, lambda job: 0.0),
        "mlfq": _mean(Mlfq, _quantum, lambda job: 0.0),
        "skip-join": _mean(Mlfq, _quantum, lambda job: job.prefill * UNIT_S),
        "srpt": _mean(_Shortest, _to_the_end, lambda job: 0.0),
    }


def _mean(order: Callable[[], Order], quantum: Callable[[int], float], joins: Callable[[Job], float]) -> float:
    return mean(_play(order(), JOBS, quantum, joins))


def _play(order: Order, jobs: Sequence[Job], quantum: Callable[[int], float], joins: Callable[[Job], float]) -> list[float]:
    """When each job ends. `quantum`: what it may run at a level before it enters again; `joins`: its first `prefill_s`."""
    left = {str(n): job.steps for n, job in enumerate(jobs)}
    level = {str(n): _level(joins(job)) for n, job in enumerate(jobs)}
    for n, job in enumerate(jobs):
        order.add(Waiting(str(n), prefill_s=joins(job), decode_s=sum(job.steps)))
    now, ends = 0.0, dict.fromkeys(left, 0.0)
    while (name := order.first(now * UNIT_S)) is not None:
        order.discard(name)
        used = 0.0
        while left[name] and used * UNIT_S < quantum(level[name]) - 1e-9:
            used += left[name].pop(0)
        now += used
        if left[name]:
            level[name] += 1
            order.add(Waiting(name, prefill_s=_quantum(level[name]), since=now * UNIT_S))
        ends[name] = now
    return list(ends.values())


def _to_the_end(level: int) -> float:
    return float("inf")


def _quantum(level: int) -> float:
    return float(QUANTUM_S * 2**level)


def _level(prefill_s: float) -> int:
    level = 0
    while _quantum(level) < prefill_s - 1e-12:
        level += 1
    return level


class _Shortest(Fcfs):
    """Not shipped: it needs to know how long an answer gets."""

    def __init__(self) -> None:
        super().__init__()
        self._size: dict[str, float] = {}

    def add(self, waiting: Waiting) -> None:
        super().add(waiting)
        self._size[waiting.request_id] = waiting.decode_s

    def first(self, now: float) -> str | None:
        return min(self._line, key=lambda name: self._size[name], default=None)
