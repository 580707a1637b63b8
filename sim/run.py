"""Runs a simulation from its beginning to its end."""

from __future__ import annotations

import gc
import itertools
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from core.config import Config
from core.cost_model import CostModel
from core.errors import ConfigError, InternalError
from sim.checks import Checks
from sim.faults import Fault
from sim.mischief import Mischief
from sim.workload import Arrival, rescaled
from sim.workload_shapes import Arrivals
from sim.workload_shapes import arrivals as times
from sim.world import WARM_S, World

EVENTS_A_LOOK = 1000
COLLECT_AFTER = 500_000
"""Objects made, before the youngest are searched for cycles."""
SETTLE_S = 90.0
"""After which the last lease, fence and reservation has run out."""
HOUR_S = 3600.0


@dataclass(frozen=True, slots=True)
class SimResult:
    """`report` has the shape of `tandem bench`'s, and what a simulation alone knows."""

    report: dict[str, Any]
    errors: dict[str, int]
    """How many requests ended with which error code."""
    wall_s: float

    @property
    def attainment(self) -> float:
        """Of the limits of TTFT and TBT together."""
        return float(self.report["attainment"]["joint"])

    @property
    def goodput_rps(self) -> float:
        return float(self.report["goodput_rps"])


def simulate(
    config: Config,
    arrivals: Iterable[Arrival] | None = None,
    policy: str | None = None,
    seed: int = 0,
    *,
    rate_scale: float = 1.0,
    faults: Iterable[Fault] = (),
    checks: bool = False,
    model: CostModel | None = None,
    prepare: Callable[[World], None] = lambda world: None,
    on_look: Callable[[World], None] = lambda world: None,
) -> SimResult:
    """`arrivals` None: a Poisson process of `sim.rate_rps`. `policy` None: `router.policy`. `model`: what steps cost, in place
    of every profile that the configuration names.

    `faults` happen to it; with `checks` every rule is looked at after every event (`sim.checks`), which takes a few times as
    long and raises BrokenRuleError. The same configuration, arrivals, policy, faults and seed give the same report but for
    `wall_s`. `prepare` is called before time begins, `on_look` every thousand events. Raises ConfigError for what cannot be
    run.
    """
    if not 0 < rate_scale < math.inf:
        raise ConfigError(f"the rate scale must be a number above 0, got {rate_scale:g}")
    started = time.perf_counter()
    due = poisson(config, seed) if arrivals is None else iter(arrivals)
    name = policy or config.router.policy
    world = World(config, rescaled(due, rate_scale) if rate_scale != 1 else due, name, seed, model)
    Mischief(world, faults)
    rules = Checks(world) if checks else None
    prepare(world)
    with _rare_collections():
        count = _play(world, config, on_look)
        if rules is not None:
            world.events.run(until=world.events.now() + SETTLE_S)
            rules.at_the_end()
    world.users.tally.check()
    wall_s = time.perf_counter() - started
    report = _report(world, name, seed) | {"events": count, "wall_s": wall_s}
    return SimResult(report, dict(sorted(world.users.errors.items())), wall_s)


def _play(world: World, config: Config, on_look: Callable[[World], None]) -> int:
    """Until every request has ended; how many events it took."""
    world.start()
    while not world.drained:
        world.events.run(most=EVENTS_A_LOOK)
        on_look(world)
        overdue_s = world.events.now() - WARM_S - world.last_arrival_s - config.router.request_timeout_s
        if world.exhausted and overdue_s > SETTLE_S:
            raise InternalError(f"{sorted(world.users.live)[:8]} go on after their deadline")
    return world.events.count


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Millions of objects live long here and hardly any is part of a cycle: looking for those took 7 % of a long run."""
    before = gc.get_threshold()
    gc.set_threshold(COLLECT_AFTER, 50, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def poisson(config: Config, seed: int) -> Iterator[Arrival]:
    """Arrivals of `sim.rate_rps` for `sim.duration_s`; gamma ones where `sim.arrival_cv` is not 1."""
    sim = config.sim
    if sim.rate_rps <= 0 or sim.duration_s is None:
        raise ConfigError("give a trace (--trace FILE), or sim.rate_rps and sim.duration_s")
    kind = Arrivals.POISSON if sim.arrival_cv == 1 else Arrivals.GAMMA
    due = times(sim.rate_rps, kind, sim.arrival_cv, random.Random(f"arrivals {seed}"))
    next(due)  # it is at 0; nobody waits there
    until_s = sim.duration_s
    for at in itertools.takewhile(lambda at: at <= until_s, due):
        yield Arrival(at, sim.input_tokens, sim.output_tokens)


def _report(world: World, policy: str, seed: int) -> dict[str, Any]:
    users = world.users
    duration_s = max(users.last_end - WARM_S, world.last_arrival_s)
    report = users.tally.report(duration_s)
    gpus = sum(replica.gpus for _, replica in world.pools.all())
    per_hour = sum(replica.usd_per_hour for _, replica in world.pools.all())
    return report | {
        "gpus": gpus,
        "goodput_rps_per_gpu": report["goodput_rps"] / gpus,
        "cost_usd": per_hour * duration_s / HOUR_S - world.controller.saved_usd(WARM_S + duration_s),
        "prefix_hit_ratio": users.cached_tokens / users.prompt_tokens if users.prompt_tokens else 0.0,
        "failovers": users.failovers,
        **({"kv_plane": world.site.plane.summary()} if world.site.plane is not None else {}),
        "policy": policy,
        "seed": seed,
    }
