"""Nouns of a request: who it is, what it may take, why it ended."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from tandem.sampling import SamplingParams


class AttemptKey(NamedTuple):
    """One placement of one request. Every message between router and workers carries it; a higher attempt supersedes."""

    request_id: str
    attempt: int

    def __str__(self) -> str:
        return f"{self.request_id}@{self.attempt}"


class FinishReason(Enum):
    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


class WorkerRole(Enum):
    PREFILL = "prefill"
    DECODE = "decode"
    COLOCATED = "colocated"
    STORE = "store"
    ROUTER = "router"


@dataclass(frozen=True, slots=True)
class Slo:
    """Latency limits of a request, in seconds. TBT is the mean of a request's slowest tenth of token gaps."""

    ttft_s: float | None = None
    tbt_s: float | None = None
    tpot_s: float | None = None

    @property
    def gap_s(self) -> float | None:
        """The stricter of the two limits of token gaps; None where there is none."""
        return min((limit for limit in (self.tbt_s, self.tpot_s) if limit is not None), default=None)


@dataclass(frozen=True, slots=True)
class WorkItem:
    """One choice of one request as a worker sees it: all that is needed to start it, or to continue it, anywhere.

    `token_ids` is the prompt followed by the tokens generated so far; the next token to sample has position
    `len(token_ids) - prompt_len`. `sampling.seed` and `sampling.max_tokens` are always set; stop strings stay with the
    router, which alone sees text. Identity of the random draw is `(sampling.seed, choice, position)`.
    """

    key: AttemptKey
    token_ids: tuple[int, ...]
    prompt_len: int
    sampling: SamplingParams
    choice: int = 0
    eos_token_ids: tuple[int, ...] = ()
    cache_salt: bytes = b""
    remaining_s: float = 0.0  # deadline as a length from arrival; 0: none

    def __post_init__(self) -> None:
        assert 0 < self.prompt_len <= len(self.token_ids), "a work item holds at least its prompt"
        assert self.sampling.seed is not None, "the router resolves the seed"
        assert self.sampling.max_tokens is not None, "the router resolves max_tokens"

    @property
    def position(self) -> int:
        """Position of the next token to sample, 0 right after the prompt."""
        return len(self.token_ids) - self.prompt_len

    @property
    def max_len(self) -> int:
        """Tokens this request can come to hold, prompt included."""
        assert self.sampling.max_tokens is not None
        return self.prompt_len + self.sampling.max_tokens

    @property
    def stop_ids(self) -> frozenset[int]:
        eos = () if self.sampling.ignore_eos else self.eos_token_ids
        return frozenset(self.sampling.stop_token_ids) | frozenset(eos)


class TokenEvent(NamedTuple):
    """One generated token on its way to the router. `finish_reason` is set on the last one.

    A tuple, because one is made per token: a frozen dataclass costs three times as much.
    """

    key: AttemptKey
    position: int
    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class AttemptTiming:
    """Where one attempt's time went, as lengths on the worker's own clock; zero where it does not apply."""

    queue_s: float = 0.0  # prefill: admitted to first scheduled
    prefill_s: float = 0.0  # first scheduled to first token sampled
    handoff_wait_s: float = 0.0  # decode: last block here to joined the running batch
    transfer_s: float = 0.0  # decode: time spent pulling
    transfer_exposed_s: float = 0.0  # decode: closing record received to last block here
    transfer_bytes: int = 0
    transport: str = ""
