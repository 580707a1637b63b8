"""What a caller of the SDK gets back. Plain frozen data, no protobuf."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class TopLogprob(NamedTuple):
    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token. `position` 0 is the first after the prompt; `choice` counts 0 … n − 1.

    `text` holds whole characters only. It may be empty where a character or a possible stop string is not complete yet;
    the text then comes with a later token. The token that carries the very end of the text has `token_id` −1 when that
    text was held back until the end was known. `logprob` is None unless `SamplingParams.logprobs` was set.
    """

    text: str
    token_id: int
    position: int
    logprob: float | None = None
    top_logprobs: tuple[TopLogprob, ...] = ()
    choice: int = 0


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timing:
    """Where the time of choice 0 went, in seconds, measured by the servers."""

    queue_s: float = 0.0
    prefill_s: float = 0.0
    handoff_wait_s: float = 0.0
    transfer_s: float = 0.0
    first_decode_s: float = 0.0
    ttft_s: float = 0.0
    tpot_s: float = 0.0
    total_s: float = 0.0
    transfer_exposed_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Placement:
    """Ids of the workers that computed choice 0; both the same when one worker did it all."""

    prefill: str = ""
    decode: str = ""


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the `n` answers. `finish_reason` is "stop", "length", "cancelled" or "error"."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    logprobs: tuple[float | None, ...] = ()
    top_logprobs: tuple[tuple[TopLogprob, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Result:
    """A whole answer. `text`, `token_ids` and `finish_reason` are those of choice 0; `choices` has all of them.

    `seed` reproduces the answer when it is given in SamplingParams.
    """

    request_id: str
    choices: tuple[Choice, ...]
    usage: Usage
    timing: Timing
    placement: Placement
    failovers: int
    seed: int
    prompt_text: str = ""

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> str:
        return self.choices[0].finish_reason


@dataclass(frozen=True, slots=True)
class Model:
    """The served model; `max_model_len` and `vocab_size` in tokens."""

    name: str
    version: str
    max_model_len: int
    vocab_size: int
    fingerprint: str
    dtype: str
