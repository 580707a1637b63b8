"""The arrivals that a command replays: a trace file, with what the file does not say filled in."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from core.config import Config
from core.roofline_file import read_shape
from sim.traces import read_trace, trace_format
from sim.workload import Arrival
from sim.workload_sessions import with_histories
from sim.workload_shapes import Arrivals, arrivals


@dataclass(frozen=True, slots=True)
class Missing:
    """What a file may leave open, and is asked for only then. `rate_rps`: of gamma arrivals with that `cv` (1 is Poisson), of
    a file of lengths alone; None: it is an error to need it. `output_tokens`: of each answer."""

    rate_rps: float | None = None
    cv: float = 1.0
    output_tokens: int | None = None
    seed: int = 0


def context_of(config: Config) -> int | None:
    """Tokens that a request may have: `model.max_model_len`, else what the config.json of a roofline says; None: none does."""
    if config.model.max_model_len is not None:
        return config.model.max_model_len
    profiles = [pool.profile or config.sim.profile for pool in config.sim.pools] or [config.sim.profile]
    paths = {each.roofline.model for each in profiles if each is not None and each.roofline is not None}
    return min((most for path in paths if (most := read_shape(path).context_max)), default=None)


def arrivals_of(path: str, missing: Missing, context_max: int | None = None) -> Iterator[Arrival]:
    """As `sim.traces.read_trace`, which says what is refused; turns of a session share their history."""
    format = trace_format(path)
    due = None
    if format.untimed and missing.rate_rps:
        kind = Arrivals.POISSON if missing.cv == 1 else Arrivals.GAMMA
        due = arrivals(missing.rate_rps, kind, missing.cv, random.Random(f"times of a trace {missing.seed}"))
    told = missing.output_tokens if format.outputless else None
    return with_histories(read_trace(path, due=due, output_tokens=told, context_max=context_max))
