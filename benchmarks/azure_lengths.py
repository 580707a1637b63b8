"""Lengths of a conversation service, as quantiles of a public trace, scaled to what a small model can hold.

Azure LLM inference trace 2023 (conversation), Microsoft Azure, licensed CC-BY 4.0 (https://creativecommons.org/licenses/by/4.0/).
Patel et al., "Splitwise: Efficient generative LLM inference using phase splitting", ISCA 2024. Changed: the first 2,400 s
reduced to the quantiles below, of input and output apart, so that who asks much is not who is told much; scaled.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from cli.load import Job
from sim.workload_lengths import Apart, Pairs, Quantiles
from sim.workload_shapes import Arrivals, arrivals

PERCENTS = (0, 1, 2, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55, 60, 65, 70, 75, 80, 85, 90, 95, 98, 99, 100)
INPUT_TOKENS = (
    2, 31, 120, 181, 220, 376, 388, 396, 402, 410, 437, 972, 1015, 1042, 1068, 1096, 1134, 1204, 1328, 2142, 4074, 4085, 4097,
    4121, 14050,
)  # fmt: skip
OUTPUT_TOKENS = (
    7, 16, 24, 39, 50, 61, 72, 81, 87, 92, 97, 104, 115, 135, 160, 194, 375, 393, 397, 410, 421, 448, 537, 598, 1000,
)  # fmt: skip
SCALE = 0.25
CONTEXT_MAX = 2048
"""Of the demo model."""
SEEDS_APART = 1_000_003
_PREFIX_NAMES = 7_000_000_001


class Lengths(Protocol):
    """`what`: in words."""

    what: str

    def draw(self, rng: random.Random) -> tuple[int, int]:
        """Input and output tokens of one request, before scaling."""
        ...


class AzureConversation:
    what = "lengths of the Azure conversation trace 2023"
    _lengths = Apart(Quantiles(PERCENTS, INPUT_TOKENS), Quantiles(PERCENTS, OUTPUT_TOKENS))

    def draw(self, rng: random.Random) -> tuple[int, int]:
        return self._lengths.draw(rng)


class FromTrace:
    """Pairs of a trace file as they stand, drawn at random. Raises ConfigError as `sim.traces.read_trace` does."""

    def __init__(self, path: str) -> None:
        self.what = f"lengths of {path}"
        self._pairs = Pairs.of_trace(path)

    def draw(self, rng: random.Random) -> tuple[int, int]:
        return self._pairs.draw(rng)


@dataclass(frozen=True, slots=True)
class Conversations:
    """Poisson arrivals of such lengths times `scale`. A share of the prompts begins with one of `prefixes` common ones."""

    lengths: Lengths
    scale: float = SCALE
    shared: float = 0.0
    prefixes: int = 6
    prefix_tokens: int = 128

    def jobs(self, rate: float, duration_s: float, seed: int, content: int = 0) -> list[Job]:
        """The same seed gives the same lengths in the same order, whatever the rate; another `content` other tokens, so that
        nobody finds in a cache what somebody else asked before (but the common prefixes)."""
        rng = random.Random(seed)
        due = arrivals(rate, Arrivals.POISSON, 1.0, random.Random(seed + 1))
        found: list[Job] = []
        for number, at in enumerate(due):
            if at >= duration_s:
                return found
            found.append(self._job(at, (content * SEEDS_APART + seed) * SEEDS_APART + number, rng))
        return found

    def one_by_one(self, seed: int) -> Iterator[Job]:
        rng = random.Random(seed)
        number = 0
        while True:
            yield self._job(0.0, seed * SEEDS_APART + number, rng)
            number += 1

    def _job(self, due_s: float, seed: int, rng: random.Random) -> Job:
        asked, told = self.lengths.draw(rng)
        output = min(max(2, round(told * self.scale)), CONTEXT_MAX // 2)
        prompt = min(max(1, round(asked * self.scale)), CONTEXT_MAX - output - 1)
        names = (_PREFIX_NAMES + rng.randrange(self.prefixes),) if rng.random() < self.shared else ()
        return Job(due_s, prompt, output, seed, names, self.prefix_tokens)
