"""What a planner knows: requests as they come, and how long a replica takes for them. Deciding code.

`FittedModel` holds coefficients as DistServe (Zhong et al., OSDI 2024, appendix A) published them for OPT on A100-80G:
`profiler-a100-80g.distserve.json` (their engine), `….vllm.json` (the colocated baseline's) and `max_num_tokens.csv`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from core.errors import ConfigError

_MS = 1e-3


class Arriving(NamedTuple):
    """One request: when it comes, the tokens it brings and the tokens it wants; 1 or more each."""

    arrival_s: float
    input_tokens: int
    output_tokens: int


class Layout(NamedTuple):
    """A replica over tp · pp GPUs: every layer split `tp` ways, the layers cut into `pp` stages."""

    tp: int
    pp: int

    @property
    def gpus(self) -> int:
        return self.tp * self.pp


class PerformanceModel(Protocol):
    """Times of one stage of a pipeline, in seconds."""

    def prefill_s(self, tokens: int, squares: int, layout: Layout) -> float:
        """A batch of prompts: the sum of their lengths and of the squares of these."""
        ...

    def decode_s(self, batch: int, context_tokens: int, layout: Layout) -> float:
        """A token each for `batch` sequences that hold `context_tokens` together."""
        ...

    def overhead_s(self, context_tokens: int) -> float:
        """What the first stage adds to every step, whatever the phase."""
        ...

    def kv_tokens(self, layout: Layout) -> int:
        """Tokens whose KV fits beside the weights; 0 where these do not fit, or nothing is known of the layout."""
        ...


@dataclass(frozen=True, slots=True)
class Shape:
    """What limits how a model may be cut: tp divides its heads, pp its layers."""

    layers: int
    heads: int


OPT_SHAPES: Mapping[str, Shape] = MappingProxyType(
    {"facebook/opt-13b": Shape(40, 40), "facebook/opt-66b": Shape(64, 72), "facebook/opt-175b": Shape(96, 96)}
)


class _Coefficients(NamedTuple):
    """In milliseconds: prefill a + b Σ length + c Σ length², decode a + b Σ context + c batch."""

    prefill: tuple[float, float, float]
    decode_small: tuple[float, float, float]
    decode_large: tuple[float, float, float]
    large_from: int


@dataclass(frozen=True, slots=True)
class FittedModel:
    """DistServe's: a pipeline divides the times by its depth, prefill pays 1 ms per stage for it, and each step costs
    2 ms + 0.1 µs per token of context in Ray."""

    by_tp: Mapping[int, _Coefficients]
    capacity: Mapping[Layout, int]

    def prefill_s(self, tokens: int, squares: int, layout: Layout) -> float:
        a, b, c = self.by_tp[layout.tp].prefill
        return ((a + b * tokens + c * squares) / layout.pp + layout.pp) * _MS

    def decode_s(self, batch: int, context_tokens: int, layout: Layout) -> float:
        found = self.by_tp[layout.tp]
        a, b, c = found.decode_small if batch < found.large_from else found.decode_large
        return (a + b * context_tokens + c * batch) / layout.pp * _MS

    def overhead_s(self, context_tokens: int) -> float:
        return (2 + 1e-4 * context_tokens) * _MS

    def kv_tokens(self, layout: Layout) -> int:
        return self.capacity.get(layout, 0) if layout.tp in self.by_tp else 0


def fitted_model(coefficients: object, capacities: Sequence[Mapping[str, str]], model: str, where: str) -> FittedModel:
    """From the parsed JSON of a profiler file and the rows of `max_num_tokens.csv`.

    Raises ConfigError that names `where` for a model that is not in them and for what is not of their shape.
    """
    try:
        tree: Any = coefficients
        if model not in tree:
            raise ConfigError(f"{where} has no {model}; it has {', '.join(sorted(tree))}")
        by_tp = {
            int(tp): _Coefficients(
                _three(found["prefill"]),
                _three(found["decoding_smallbs"]),
                _three(found["decoding_largebs"]),
                int(found["decoding_large_small_bs_threshold"]),
            )
            for tp, found in tree[model].items()
        }
        capacity = {
            Layout(int(row["tp"]), int(row["pp"])): int(row["max_num_tokens"]) for row in capacities if row["model"] == model
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{where} is no profile of DistServe's: {type(error).__name__} {error}") from None
    return FittedModel(MappingProxyType(by_tp), MappingProxyType(capacity))


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    a, b, c = (float(value) for value in values)
    return a, b, c
