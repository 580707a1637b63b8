"""What happened in a simulated cluster over time: queues, batches and memory by role, and how many met their limits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

from sim.world import World

FIRST_STEP_S = 0.25
SAMPLES_MAX = 800
"""Beyond it every second sample goes and the step doubles: a run of any length takes the same memory."""


@dataclass(frozen=True, slots=True)
class PoolSample:
    """Means over the living workers of a role but `workers`. `kv_used`: share of blocks that requests hold."""

    workers: int
    waiting: float
    running: float
    kv_used: float


NOBODY = PoolSample(0, 0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Sample:
    """`ended` and `met`: requests since the beginning, and those of them within their limits of TTFT and TBT."""

    at_s: float
    pools: dict[str, PoolSample]
    arrived: int
    ended: int
    met: int


@dataclass(slots=True)
class Timeline:
    """Call `watch` before time begins (`sim.run.simulate(prepare=…)`)."""

    step_s: float = FIRST_STEP_S
    samples: list[Sample] = field(default_factory=list)

    def watch(self, world: World) -> None:
        def look() -> None:
            self.add(sample_of(world))
            if not world.drained:
                world.events.later(self.step_s, look)

        world.events.later(self.step_s, look)

    def add(self, sample: Sample) -> None:
        self.samples.append(sample)
        if len(self.samples) >= SAMPLES_MAX:
            del self.samples[::2]
            self.step_s *= 2

    def roles(self) -> list[str]:
        return sorted({role for sample in self.samples for role in sample.pools}, key=("prefill", "decode", "colocated").index)

    def of(self, role: str, value: Callable[[PoolSample], float]) -> list[tuple[float, float]]:
        """Where nobody of that role lives, everything is zero."""
        return [(one.at_s, value(one.pools.get(role, NOBODY))) for one in self.samples]

    def attainment(self, bins: int = 40) -> list[tuple[float, float]]:
        """(time, share within limits of the requests that ended in a bin); bins in which none did are left out."""
        marks = self.samples[:: max(1, len(self.samples) // bins)]
        return [
            ((before.at_s + after.at_s) / 2, (after.met - before.met) / (after.ended - before.ended))
            for before, after in pairwise(marks)
            if after.ended > before.ended
        ]


def sample_of(world: World) -> Sample:
    alive: dict[str, list[tuple[int, int, float]]] = {}
    for worker in world.site.workers.values():
        if worker.alive:
            counts, load = worker.inventory.counts(), worker.load
            used = counts.active / counts.total if counts.total else 0.0
            alive.setdefault(worker.role.value, []).append((load.waiting + len(worker.ingests), load.running, used))
    tally = world.users.tally
    pools = {role: _mean(found) for role, found in alive.items()}
    return Sample(world.events.now(), pools, world.arrived, tally.requests, tally.met("joint"))


def _mean(found: list[tuple[int, int, float]]) -> PoolSample:
    waiting, running, used = (sum(column) / len(found) for column in zip(*found, strict=True))
    return PoolSample(len(found), waiting, running, used)
