"""What a load consists of: when requests are due, how long they are, and what their prompts share."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from cli.arrivals import Arrivals, arrivals
from cli.load import Job
from core.trace import HASH_BLOCK_TOKENS, read_trace
from tandem.errors import InvalidRequestError

SEEDS_APART = 1_000_003
_PREFIX_NAMES = 1_000_000_007  # far from the block names of traces


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens, drawn evenly from `low` to `high`; both included."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str, option: str) -> Lengths:
        """From `N` or `LOW-HIGH`. Raises InvalidRequestError that names the option."""
        low, dash, high = text.partition("-")
        try:
            made = cls(int(low), int(high if dash else low))
        except ValueError:
            made = cls(0, 0)
        if not 1 <= made.low <= made.high:
            raise InvalidRequestError(f"{option} must be a number of tokens or LOW-HIGH, at least 1, got {text!r}")
        return made

    def draw(self, rng: random.Random) -> int:
        return rng.randint(self.low, self.high)


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

    input: Lengths
    output: Lengths
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
    """The requests of a trace. `speed` 2 halves the gaps; `scale` multiplies lengths, which end at the maxima."""

    path: str
    speed: float
    scale: float
    input_max: float
    output_max: float
    seed: int

    def open(self, duration_s: float, context_max: int | None) -> Iterator[Job]:
        """Those due within `duration_s`, cut to what the served model can hold, where that is known.

        Raises ConfigError as `core.trace.read_trace` does.
        """
        for number, request in enumerate(read_trace(self.path)):
            due_s = request.arrival_s / self.speed
            if due_s >= duration_s:
                return
            block = max(1, round(HASH_BLOCK_TOKENS * self.scale))
            output = self._cut(request.output_tokens, self.output_max)
            inputs = self._cut(request.input_tokens, self.input_max)
            if context_max is not None:
                output = min(output, max(1, context_max // 2))
                inputs = min(inputs, max(1, context_max - output - 1))
            yield Job(due_s, inputs, output, self.seed * SEEDS_APART + number, request.prefix_ids, block)

    def _cut(self, tokens: int, most: float) -> int:
        return max(1, math.floor(min(tokens * self.scale, most)))
