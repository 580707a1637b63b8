"""How long a step takes: a small linear model of what is in it, fitted to measured steps. Deciding code.

A step computes new prompt tokens and one token of each running sequence. Its time is nearly

    base + a · prompt tokens + b · prompt token–context pairs + c · decode rows + d · decode context

with no coefficient below zero: products grow with rows, attention with row–context pairs, weights are read once (base).
DistServe (appendix A) and Vidur fit the same terms. Router, planner and simulator share this file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any

from core.errors import ConfigError

FORMAT = "tandem cost model 1"


@dataclass(frozen=True, slots=True)
class StepShape:
    """What one step computes. `prefill_pairs`: for each new prompt token, the tokens it looks at, itself included."""

    prefill_tokens: int = 0
    prefill_pairs: int = 0
    decode_rows: int = 0
    decode_context: int = 0
    """Tokens that the decode rows look at, summed."""

    def __add__(self, other: StepShape) -> StepShape:
        return StepShape(
            self.prefill_tokens + other.prefill_tokens,
            self.prefill_pairs + other.prefill_pairs,
            self.decode_rows + other.decode_rows,
            self.decode_context + other.decode_context,
        )

    @staticmethod
    def of(rows: Iterable[tuple[int, int]]) -> StepShape:
        """From (tokens computed, context before them) of each row; a row of one token with a context decodes."""
        prefill_tokens = prefill_pairs = decode_rows = decode_context = 0
        for count, context in rows:
            if count == 1 and context:
                decode_rows += 1
                decode_context += context + 1
            else:
                prefill_tokens += count
                prefill_pairs += pairs(count, context)
        return StepShape(prefill_tokens, prefill_pairs, decode_rows, decode_context)


def pairs(new_tokens: int, context: int) -> int:
    """Causal attention of `new_tokens` behind `context`: sum over i of context + i, i from 1."""
    return new_tokens * context + new_tokens * (new_tokens + 1) // 2


@dataclass(frozen=True, slots=True)
class StepCost:
    """Coefficients in seconds."""

    base_s: float
    prefill_token_s: float
    prefill_pair_s: float
    decode_row_s: float
    decode_context_s: float

    def step_s(self, shape: StepShape) -> float:
        return (
            self.base_s
            + self.prefill_token_s * shape.prefill_tokens
            + self.prefill_pair_s * shape.prefill_pairs
            + self.decode_row_s * shape.decode_rows
            + self.decode_context_s * shape.decode_context
        )

    def prefill_s(self, new_tokens: int, context: int = 0, chunk_tokens: int = 0) -> float:
        """A prompt alone: `new_tokens` behind `context` cached ones, in chunks of `chunk_tokens` (0: in one)."""
        if new_tokens <= 0:
            return 0.0
        steps = math.ceil(new_tokens / chunk_tokens) if chunk_tokens else 1
        tokens_s = self.prefill_token_s * new_tokens + self.prefill_pair_s * pairs(new_tokens, context)
        return steps * self.base_s + tokens_s

    def decode_s(self, rows: int, context: int) -> float:
        """One step of `rows` sequences that hold `context` tokens together: the gap between two tokens of each."""
        return self.base_s + self.decode_row_s * rows + self.decode_context_s * context

    def scaled(self, factor: float) -> StepCost:
        return StepCost(*(factor * value for value in self._values()))

    def _values(self) -> tuple[float, ...]:
        return (self.base_s, self.prefill_token_s, self.prefill_pair_s, self.decode_row_s, self.decode_context_s)


@dataclass(frozen=True, slots=True)
class Fit:
    """`median_error` and `p90_error`: of |predicted − measured| / measured over the samples."""

    cost: StepCost
    samples: int
    median_error: float
    p90_error: float


class Drift:
    """Keeps a fitted cost true while the machine changes: one factor for all, from observed against predicted steps.

    The median of the latest ratios, so that a step that was interrupted moves nothing.
    """

    WINDOW = 63
    FACTOR_MAX = 20.0

    def __init__(self, cost: StepCost) -> None:
        self._cost = cost
        self._ratios: list[float] = []
        self._next = 0

    def observe(self, shape: StepShape, seconds: float) -> None:
        predicted = self._cost.step_s(shape)
        if not (predicted > 0 and seconds > 0 and math.isfinite(seconds)):
            return
        ratio = min(max(seconds / predicted, 1 / self.FACTOR_MAX), self.FACTOR_MAX)
        if len(self._ratios) < self.WINDOW:
            self._ratios.append(ratio)
        else:
            self._ratios[self._next] = ratio
        self._next = (self._next + 1) % self.WINDOW

    @property
    def factor(self) -> float:
        """Observed over predicted; 1 before anything was observed."""
        return sorted(self._ratios)[len(self._ratios) // 2] if self._ratios else 1.0

    @property
    def cost(self) -> StepCost:
        return self._cost.scaled(self.factor) if self._ratios else self._cost


@dataclass(frozen=True, slots=True)
class LinkCost:
    """Moving bytes over one kind of link: `latency_s` once, then `bytes_per_s`."""

    latency_s: float
    bytes_per_s: float

    def transfer_s(self, num_bytes: int) -> float:
        return self.latency_s + num_bytes / self.bytes_per_s if num_bytes else 0.0


@dataclass(frozen=True, slots=True)
class CostModel:
    """What `tandem profile` writes. `fingerprint`: of the model it was measured on (hexadecimal), empty when it fits any (a GPU
    profile). `median_error`, `p90_error`: on the steps it was fitted to; `heldout_…`: on steps it was not, fold by fold.
    """

    steps: StepCost
    kv_token_bytes: int
    links: Mapping[str, LinkCost] = field(default_factory=lambda: MappingProxyType({}))
    fingerprint: str = ""
    machine: str = ""
    samples: int = 0
    median_error: float = 0.0
    p90_error: float = 0.0
    heldout_median_error: float = 0.0
    heldout_p90_error: float = 0.0

    def to_json(self) -> dict[str, Any]:
        tree: dict[str, Any] = {"format": FORMAT} | {name: getattr(self, name) for name in self.__slots__}
        return tree | {"steps": asdict(self.steps), "links": {name: asdict(link) for name, link in self.links.items()}}

    @staticmethod
    def from_json(tree: object, where: str) -> CostModel:
        """Raises ConfigError that names `where` for anything that `to_json` cannot have given."""
        try:
            if not isinstance(tree, dict) or tree.get("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT!r}")
            fields = {key: value for key, value in tree.items() if key != "format"}
            steps = StepCost(**{name: _number(name, value) for name, value in fields.pop("steps").items()})
            links = {
                name: LinkCost(**{key: _number(f"{name}.{key}", value) for key, value in link.items()})
                for name, link in fields.pop("links").items()
            }
            if any(link.bytes_per_s <= 0 for link in links.values()):
                raise ValueError("a link moves no bytes")
            for name, kind in _PLAIN.items():
                if name in fields:
                    fields[name] = kind(name, fields[name])
            return CostModel(steps=steps, links=MappingProxyType(links), **fields)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise ConfigError(f"{where} is no cost model ({error}); write one with `tandem profile --json {where}`") from None


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
    return float(value)


def _count(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} must be a whole number of at least 0, got {value!r}")
    return value


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a text, got {value!r}")
    return value


_PLAIN: Mapping[str, Callable[[str, object], object]] = MappingProxyType(
    {
        "kv_token_bytes": _count,
        "samples": _count,
        "fingerprint": _text,
        "machine": _text,
        "median_error": _number,
        "p90_error": _number,
        "heldout_median_error": _number,
        "heldout_p90_error": _number,
    }
)
