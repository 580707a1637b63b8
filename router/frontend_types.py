"""What the front doors (gRPC and HTTP) hand to `router.frontend.Frontend`, and what they get back.

Plain values: no protobuf and no JSON, so both doors are thin translations of the same call.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from core.request import FinishReason, Slo
from tandem.sampling import SamplingParams

if TYPE_CHECKING:
    from router.decisions import Explanation


@dataclass(frozen=True, slots=True)
class ChatMessage:
    role: str
    content: str


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """Rendered with the model's chat template, the assistant's turn opened at the end."""

    messages: tuple[ChatMessage, ...]


@dataclass(frozen=True, slots=True)
class FrontRequest:
    """One call of a user. `prompt`: text, token ids, or a chat.

    `request_id` empty: the router makes one. A given id must be unique among the live ones, at most 128 printable
    characters without "/". `echo` sends the prompt's text back in `Started`. Class, tenant, limits and deadline:
    `router.slo` says what they come to. `traceparent`: of W3C, the trace that it is part of.
    """

    prompt: str | tuple[int, ...] | ChatPrompt
    sampling: SamplingParams = field(default_factory=SamplingParams)
    request_id: str = ""
    slo_class: str = ""
    slo: Slo = field(default_factory=Slo)
    priority: int = 0
    echo: bool = False
    tenant: str = ""
    deadline_s: float | None = None
    traceparent: str = ""


@dataclass(frozen=True, slots=True)
class Started:
    """First part of every stream: the request has been accepted by a worker. Errors raised before it carry a status."""

    request_id: str
    prompt_tokens: int
    seed: int
    prompt_text: str  # empty unless echo was asked


class Token(NamedTuple):
    """`text` holds whole UTF-8 characters only and may be empty (held back for a character or a stop string).

    A tuple, because one is made per token.
    """

    choice: int
    position: int
    token_id: int
    text: str
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()  # (token id, log-probability), best first


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Everything that arrived since the reader last came: one token when it keeps up, more when it lags."""

    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class ChoiceFinished:
    choice: int
    finish_reason: FinishReason
    tail_text: str  # text held back until the end was known


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds, of choice 0; `ttft_s` and `total_s` from the router accepting the request, `tpot_s` the mean token gap.

    `queue_s` arrival to first scheduled on prefill; `handoff_wait_s` last block on decode to joined; `transfer_s` spent
    pulling, `transfer_exposed_s` of it after prefill had ended; `first_decode_s` what the hand-off did not take of the
    gap between the first two tokens.
    """

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
    """Worker ids of the last attempt of choice 0; both the same when one worker computed it all."""

    prefill: str
    decode: str


@dataclass(frozen=True, slots=True)
class Finished:
    """Last part of a stream that did not raise."""

    usage: Usage
    timing: Timing
    placement: Placement
    failovers: int


Part = Started | TokenBatch | ChoiceFinished | Finished


@dataclass(frozen=True, slots=True)
class ModelCard:
    """The served model. `max_model_len` is the context in tokens that a request may fill."""

    name: str
    version: str
    max_model_len: int
    vocab_size: int
    fingerprint: str  # hexadecimal
    dtype: str


class FrontDoor(Protocol):
    """What `router/http.py` and `router/service.py` need; `router.frontend.Frontend` is it."""

    def generate(self, request: FrontRequest) -> AsyncGenerator[Part, None]:
        """Streams one request: Started, TokenBatch…, ChoiceFinished per choice (in between), Finished.

        Raises TandemError children, before `Started` whenever the fault was known by then. Closing the generator
        (`aclose`, or cancelling the task that iterates it) cancels the request on every worker.
        """
        ...

    def cancel(self, request_id: str) -> bool:
        """Ends a live request; its stream finishes with CANCELLED. False: no such request."""
        ...

    def explain(self, request_id: str) -> Explanation:
        """Why a request was placed where it was. Raises NotFoundError when nothing is known of it (any more)."""
        ...

    def model(self) -> ModelCard:
        """Raises UnavailableError while no worker has reported yet."""
        ...

    def ready(self) -> bool:
        """A (prefill, decode) pair or a colocated worker is connected."""
        ...
