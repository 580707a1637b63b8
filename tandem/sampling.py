"""What a user may ask of the sampler. Plain data: the SDK, the router and the engine share this one class."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGIT_BIAS = 4096
MAX_TOP_K = 2**31 - 1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens and when to stop.

    `temperature=0` is greedy. `top_k=0`, `top_p=1`, `min_p=0` are off. `max_tokens=None` generates until the model stops
    or its context is full. The token at position *n* of choice *c* depends only on the logits and `(seed, c, n)`, so the
    same seed gives the same text whatever machine continues the request.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    n: int = 1
    logprobs: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def problems(self) -> list[str]:
        """Every contradiction, each as a sentence that says what to change; empty when the values can be served."""
        checks = (
            (self.max_tokens is None or self.max_tokens >= 1, f"max_tokens must be at least 1, got {self.max_tokens}"),
            (_in(self.temperature, 0.0, 100.0), f"temperature must be between 0 and 100, got {self.temperature}"),
            (0 <= self.top_k <= MAX_TOP_K, f"top_k must be 0 (off) or between 1 and {MAX_TOP_K}, got {self.top_k}"),
            (_in(self.top_p, 0.0, 1.0) and self.top_p > 0, f"top_p must be in (0, 1], got {self.top_p}"),
            (_in(self.min_p, 0.0, 1.0), f"min_p must be between 0 and 1, got {self.min_p}"),
            (
                _in(self.repetition_penalty, 0.01, 100.0),
                f"repetition_penalty must be between 0.01 and 100, got {self.repetition_penalty}",
            ),
            (_in(self.presence_penalty, -2.0, 2.0), f"presence_penalty must be between -2 and 2, got {self.presence_penalty}"),
            (
                _in(self.frequency_penalty, -2.0, 2.0),
                f"frequency_penalty must be between -2 and 2, got {self.frequency_penalty}",
            ),
            (
                len(self.logit_bias) <= MAX_LOGIT_BIAS,
                f"logit_bias takes at most {MAX_LOGIT_BIAS} tokens, got {len(self.logit_bias)}",
            ),
            (all(_in(b, -100.0, 100.0) for b in self.logit_bias.values()), "logit_bias values must be between -100 and 100"),
            (self.seed is None or 0 <= self.seed < 2**64, f"seed must fit in 64 unsigned bits, got {self.seed}"),
            (1 <= self.n <= MAX_CHOICES, f"n must be between 1 and {MAX_CHOICES}, got {self.n}"),
            (
                self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS,
                f"logprobs must be between 0 and {MAX_LOGPROBS}, got {self.logprobs}",
            ),
            (len(self.stop) <= MAX_STOP_STRINGS, f"stop takes at most {MAX_STOP_STRINGS} strings, got {len(self.stop)}"),
            (
                len(self.stop_token_ids) <= MAX_STOP_TOKEN_IDS,
                f"stop_token_ids takes at most {MAX_STOP_TOKEN_IDS} ids, got {len(self.stop_token_ids)}",
            ),
            (all(0 < len(s) <= MAX_STOP_CHARS for s in self.stop), f"stop strings must have 1 to {MAX_STOP_CHARS} characters"),
        )
        return [message for ok, message in checks if not ok]


def _in(value: float, low: float, high: float) -> bool:
    return math.isfinite(value) and low <= value <= high
