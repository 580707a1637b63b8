"""What a load consists of: when requests are due, how long they are, and what their prompts share."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from cli.load import Job
from sim.trace_arrivals import Missing, arrivals_of
from sim.trace_formats import HASH_BLOCK_TOKENS
from sim.workload import rescaled, resized, within_context
from sim.workload_lengths import TokenRange
from sim.workload_shapes import Arrivals, arrivals

SEEDS_APART = 1_000_003
_PREFIX_NAMES = 1_000_000_007  # far from the block names of traces


@dataclass(frozen=True, slots=True)
class Sharing:
    """Every prompt begins with one of `prefixes` common ones of `tokens` tokens (fewer where the prompt is shorter)."""

    tokens: int = 0
    prefixes: int = 1

    def ids(self, rng: random.Random) -> tuple[int, ...]:
        return (_PREFIX_NAMES + rng.randrange(self.prefixes),) if self.tokens else ()


@dataclass(frozen=True, slots=True)
class Workload:
    """A load of drawn requests; the same seed gives the same one."""

    input: TokenRange
    output: TokenRange
    sharing: Sharing
    arrivals: Arrivals
    cv: float
    seed: int

    def open(self, rate: float, duration_s: float) -> Iterator[Job]:
        """Due within `duration_s`, at `rate` requests per second."""
        due = arrivals(rate, self.arrivals, self.cv, random.Random(self.seed))
        return self._jobs(itertools.takewhile(lambda at: at < duration_s, due))

    def closed(self) -> Iterator[Job]:
        """Without end, due whenever a client is free."""
        return self._jobs(itertools.repeat(0.0))

    def _jobs(self, due: Iterator[float]) -> Iterator[Job]:
        for number, at in enumerate(due):
            seed = self.seed * SEEDS_APART + number
            rng = random.Random(seed)
            lengths = self.input.draw(rng), self.output.draw(rng)
            yield Job(at, *lengths, seed, self.sharing.ids(rng), self.sharing.tokens or HASH_BLOCK_TOKENS)


@dataclass(frozen=True, slots=True)
class Replay:
    """The requests of a trace. `speed` 2 halves the gaps; `scale` multiplies lengths, which end at the maxima. `missing`: what
    a file without times or answers needs."""

    path: str
    speed: float
    scale: float
    input_max: float
    output_max: float
    seed: int
    missing: Missing = field(default_factory=Missing)

    def open(self, duration_s: float, context_max: int | None) -> Iterator[Job]:
        """Those due within `duration_s`, cut to what the served model can hold, where that is known.

        Raises ConfigError as `sim.trace_arrivals.arrivals_of` does.
        """
        due = rescaled(arrivals_of(self.path, self.missing), self.speed)
        requests = resized(due, self.scale, self.input_max, self.output_max)
        if context_max is not None:
            requests = within_context(requests, context_max)
        for number, a in enumerate(itertools.takewhile(lambda a: a.arrival_s < duration_s, requests)):
            seed = self.seed * SEEDS_APART + number
            yield Job(a.arrival_s, a.input_tokens, a.output_tokens, seed, a.blocks, a.block_tokens or HASH_BLOCK_TOKENS)
