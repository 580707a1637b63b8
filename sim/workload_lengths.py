"""How long requests are: distributions of input and output tokens, drawn with the caller's `random.Random`."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, repeat
from typing import Protocol

from core.errors import ConfigError
from sim.traces import read_trace, trace_format
from sim.workload import Arrival
from tandem.errors import InvalidRequestError


class Lengths(Protocol):
    def draw(self, rng: random.Random) -> tuple[int, int]:
        """Input and output tokens of one request, 1 or more each."""
        ...


class Tokens(Protocol):
    def draw(self, rng: random.Random) -> int:
        """One number of tokens."""
        ...


@dataclass(frozen=True, slots=True)
class TokenRange:
    """Tokens, drawn evenly from `low` to `high`; both included."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str, option: str) -> TokenRange:
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


class Quantiles:
    """Tokens by quantiles of a distribution, straight lines between them: `percents` from 0 to 100, and the value at each."""

    __slots__ = ("_percents", "_values")

    def __init__(self, percents: Sequence[float], values: Sequence[float]) -> None:
        self._percents, self._values = percents, values

    def at(self, percent: float) -> float:
        percents, values = self._percents, self._values
        high = max(1, bisect_left(percents, percent))
        low = high - 1
        share = (percent - percents[low]) / (percents[high] - percents[low])
        return values[low] + share * (values[high] - values[low])

    def draw(self, rng: random.Random) -> int:
        return round(self.at(rng.random() * 100))


@dataclass(frozen=True, slots=True)
class Apart:
    """Input and output drawn each for itself, as where a source publishes no more than two histograms."""

    input: Tokens
    output: Tokens

    def draw(self, rng: random.Random) -> tuple[int, int]:
        return max(1, self.input.draw(rng)), max(1, self.output.draw(rng))


@dataclass(frozen=True, slots=True)
class Pairs:
    """Pairs of a recording as they stand, drawn at random."""

    pairs: Sequence[tuple[int, int]]

    @classmethod
    def of_trace(cls, path: str, most: int = 100_000) -> Pairs:
        """Of the first `most` requests of a trace, or of a file of lengths alone.

        Raises ConfigError as `sim.traces.read_trace` does, and when there is none.
        """
        due = repeat(0.0) if trace_format(path).untimed else None
        pairs = [(a.input_tokens, a.output_tokens) for a in islice(read_trace(path, due=due), most)]
        if not pairs:
            raise ConfigError(f"{path} has no requests whose lengths could be drawn")
        return cls(pairs)

    def draw(self, rng: random.Random) -> tuple[int, int]:
        return rng.choice(self.pairs)


def drawn(due: Iterable[float], lengths: Lengths, rng: random.Random) -> Iterator[Arrival]:
    """Requests at these times, of such lengths, that share nothing."""
    for at in due:
        asked, told = lengths.draw(rng)
        yield Arrival(at, asked, told)
