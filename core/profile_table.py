"""Step times read off a measured table, straight lines between its points: Splitwise's performance model. Deciding code.

Patel et al. (ISCA 2024) interpolate linearly over the tokens of a batch; their released simulator looks the time
of a decode up under its *number of sequences* although the table was made over prompt tokens, and charges a mixed step 1.1
times a prompt step of all its tokens. That is kept (`Lookup.ROWS`), so that its results can be had exactly. `Lookup.CONTEXT`
looks a decode up under the tokens that its sequences hold, which is what the table says.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from statistics import median

from core.cost_model import StepShape, pairs

MIXED_FACTOR = 1.1


class Lookup(Enum):
    """What of a decode step the table is entered with."""

    ROWS = "rows"
    CONTEXT = "context"


@dataclass(frozen=True, slots=True)
class Curve:
    """Straight lines through points in order of x, the outer ones continued. At least two points, no x twice."""

    xs: tuple[float, ...]
    ys: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.xs) < 2 or len(self.xs) != len(self.ys) or any(b <= a for a, b in zip(self.xs, self.xs[1:], strict=False)):
            raise ValueError(f"a curve needs two or more points of rising x, got {self.xs}")

    @staticmethod
    def of(points: Iterable[tuple[float, float]]) -> Curve:
        """The medians of what was measured at each x. Raises ValueError for fewer than two of these."""
        at: dict[float, list[float]] = {}
        for x, y in points:
            at.setdefault(x, []).append(y)
        xs = tuple(sorted(at))
        return Curve(xs, tuple(median(at[x]) for x in xs))

    def __call__(self, x: float) -> float:
        right = min(max(bisect_right(self.xs, x), 1), len(self.xs) - 1)
        x0, x1, y0, y1 = self.xs[right - 1], self.xs[right], self.ys[right - 1], self.ys[right]
        return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


@dataclass(frozen=True, slots=True)
class ProfileTable:
    """`prompt`: seconds of a prompt step by its tokens; `token`: of a decode step by tokens. `step_s` can stand wherever a
    fitted cost's does."""

    prompt: Curve
    token: Curve
    kv_token_bytes: int
    lookup: Lookup = Lookup.ROWS

    def step_s(self, shape: StepShape) -> float:
        if not shape.prefill_tokens:
            return self.decode_s(shape.decode_rows, shape.decode_context) if shape.decode_rows else 0.0
        if not shape.decode_rows:
            return self.prompt(shape.prefill_tokens)
        return MIXED_FACTOR * self.prompt(shape.prefill_tokens + shape.decode_rows)

    def prefill_s(self, new_tokens: int, context: int = 0, chunk_tokens: int = 0) -> float:
        """A prompt alone. The table knows nothing of cached context: those tokens are not charged."""
        size = chunk_tokens or new_tokens
        counts = [min(size, new_tokens - start) for start in range(0, new_tokens, size)] if new_tokens > 0 else []
        return sum(self.step_s(StepShape(count, pairs(count, context))) for count in counts)

    def decode_s(self, rows: int, context: int) -> float:
        """One step of `rows` sequences that hold `context` tokens together."""
        return self.token(rows if self.lookup is Lookup.ROWS else context)
