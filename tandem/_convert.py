"""The SDK's one boundary to protobuf and gRPC: plain values in, messages out, and back; foreign errors become ours."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias, TypedDict, cast

import grpc

from tandem.errors import (
    AuthenticationError,
    CancelledError,
    DeadlineExceededError,
    InternalError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    PermissionDeniedError,
    PromptTooLongError,
    QuotaExceededError,
    RequestTooLargeError,
    SloUnattainableError,
    TandemError,
    UnavailableError,
)
from tandem.results import Model, Placement, Timing, Token, TopLogprob, Usage
from tandem.sampling import SamplingParams
from tandem.v1 import common_pb2 as common
from tandem.v1 import inference_pb2 as inference

CODE_KEY = "tandem-code"
RETRY_AFTER_KEY = "tandem-retry-after-s"

Prompt: TypeAlias = str | Sequence[int] | Sequence[Mapping[str, str]]
"""Text, token ids, or chat messages with `role` and `content`."""

FINISH_NAMES = {
    common.FINISH_REASON_STOP: "stop",
    common.FINISH_REASON_LENGTH: "length",
    common.FINISH_REASON_CANCELLED: "cancelled",
    common.FINISH_REASON_ERROR: "error",
}


class RequestOptions(TypedDict, total=False):
    """What a request may carry beside prompt and sampling."""

    request_id: str  # "": the router makes one
    tenant: str  # whose request it is; "": `default`
    slo_class: str  # `interactive`, `standard`, `batch` or what the router has; "": the tenant's default, else the router's
    ttft_slo_s: float  # limit for the first token
    tbt_slo_s: float  # limit for the mean of the slowest tenth of token gaps
    tpot_slo_s: float  # limit for the mean token gap
    deadline_s: float  # for the whole answer; what takes longer ends with DeadlineExceededError
    priority: int  # added to that of its class; higher goes first
    echo: bool  # result.prompt_text holds the prompt as text


def request_to_pb(prompt: Prompt, sampling: SamplingParams | None, options: RequestOptions) -> inference.GenerateRequest:
    """Raises InvalidRequestError for what the server would have to refuse anyway."""
    sampling = sampling or SamplingParams()
    if isinstance(sampling.stop, str):  # the commonest slip; its letters are not meant as stop strings
        sampling = replace(sampling, stop=(sampling.stop,))
    if problems := sampling.problems():
        raise InvalidRequestError("; ".join(problems))
    if unknown := set(options) - set(RequestOptions.__annotations__):
        raise InvalidRequestError(
            f"unknown options {sorted(unknown)}; a request takes {sorted(RequestOptions.__annotations__)}, "
            "and the rest belongs into SamplingParams"
        )
    try:
        message = inference.GenerateRequest(sampling=sampling_to_pb(sampling), **options)
        _set_prompt(message, prompt)
    except (TypeError, ValueError, OverflowError) as error:  # UnicodeEncodeError, of lone surrogates, is a ValueError
        raise InvalidRequestError(f"the request cannot be encoded: {error}") from None
    return message


def _set_prompt(message: inference.GenerateRequest, prompt: Prompt) -> None:
    if len(prompt) == 0:
        raise InvalidRequestError("the prompt is empty; send text, token ids or chat messages")
    if isinstance(prompt, str):
        message.text = prompt
    elif isinstance(prompt, bytes | bytearray):  # a sequence of numbers, but none of them meant as a token
        raise InvalidRequestError("a prompt is text, token ids or messages; decode bytes into text first")
    elif isinstance(prompt[0], Mapping):
        for entry in cast("Sequence[Mapping[str, str]]", prompt):
            if not isinstance(entry, Mapping) or set(entry) != {"role", "content"}:
                raise InvalidRequestError(f"a chat message has exactly `role` and `content`, got {entry!r}")
            message.chat.messages.add(role=entry["role"], content=entry["content"])
    else:
        message.token_ids.ids.extend(operator.index(i) for i in cast("Sequence[int]", prompt))


def sampling_to_pb(params: SamplingParams) -> common.SamplingParams:
    return common.SamplingParams(
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=dict(params.logit_bias),
        seed=params.seed,
        n=params.n,
        logprobs=params.logprobs,
        stop=params.stop,
        stop_token_ids=params.stop_token_ids,
        ignore_eos=params.ignore_eos,
    )


def token_from_pb(message: inference.Token) -> Token:
    return Token(
        message.text,
        message.token_id,
        message.position,
        message.logprob if message.HasField("logprob") else None,
        tuple(TopLogprob(top.token_id, top.logprob) for top in message.top_logprobs),
        message.choice,
    )


def usage_from_pb(message: inference.Usage) -> Usage:
    return Usage(message.prompt_tokens, message.cached_tokens, message.completion_tokens)


def timing_from_pb(message: inference.Timing) -> Timing:
    return Timing(
        queue_s=message.queue_s,
        prefill_s=message.prefill_s,
        handoff_wait_s=message.handoff_wait_s,
        transfer_s=message.transfer_s,
        first_decode_s=message.first_decode_s,
        ttft_s=message.ttft_s,
        tpot_s=message.tpot_s,
        total_s=message.total_s,
        transfer_exposed_s=message.transfer_exposed_s,
    )


def placement_from_pb(message: inference.Placement) -> Placement:
    return Placement(message.prefill, message.decode)


def model_from_pb(message: inference.GetModelResponse) -> Model:
    return Model(
        name=message.name,
        version=message.version,
        max_model_len=message.max_model_len,
        vocab_size=message.vocab_size,
        fingerprint=message.fingerprint,
        dtype=message.dtype,
    )


# ---- errors --------------------------------------------------------------------------------------------------------

_BY_CODE: dict[str, type[TandemError]] = {
    kind.code: kind
    for kind in (
        InvalidRequestError,
        PromptTooLongError,
        AuthenticationError,
        PermissionDeniedError,
        NotFoundError,
        RequestTooLargeError,
        OverloadedError,
        QuotaExceededError,
        SloUnattainableError,
        CancelledError,
        DeadlineExceededError,
        UnavailableError,
        InternalError,
    )
}
_BY_STATUS: dict[str, type[TandemError]] = {
    "INVALID_ARGUMENT": InvalidRequestError,
    "OUT_OF_RANGE": InvalidRequestError,
    "ALREADY_EXISTS": InvalidRequestError,
    "FAILED_PRECONDITION": InvalidRequestError,
    "UNAUTHENTICATED": AuthenticationError,
    "PERMISSION_DENIED": PermissionDeniedError,
    "NOT_FOUND": NotFoundError,
    "RESOURCE_EXHAUSTED": OverloadedError,
    "CANCELLED": CancelledError,
    "DEADLINE_EXCEEDED": DeadlineExceededError,
    "UNAVAILABLE": UnavailableError,
}


def error_from_rpc(error: grpc.RpcError, address: str) -> TandemError:
    """Our error for one of gRPC's: by the code that our servers send along, else by status."""
    call = cast("grpc.Call", error)  # every RpcError of a finished call is one
    status, details = call.code().name, call.details() or ""
    sent = {str(key): value for key, value in cast("Iterable[tuple[str, str]]", call.trailing_metadata() or ())}
    kind = _BY_CODE.get(str(sent.get(CODE_KEY, "")))
    if kind is None:
        kind = _BY_STATUS.get(status, InternalError)
        if CODE_KEY not in sent:  # gRPC's own words; a server of ours, maybe a newer one, has explained itself
            details = _explain(status, details, address)
        if kind is OverloadedError and "larger than max" in details:  # said by gRPC itself, before our code sees it
            kind = RequestTooLargeError
    return kind(details or status, retry_after_s=_seconds(sent.get(RETRY_AFTER_KEY)))


def _explain(status: str, details: str, address: str) -> str:
    if status == "UNAVAILABLE":
        return f"cannot reach the router at {address} ({details}); check the address and that it is running"
    if status == "DEADLINE_EXCEEDED":
        return f"the request did not end within its timeout_s ({details}); allow more time or fewer tokens"
    if status == "UNIMPLEMENTED":
        return f"{address} does not serve tandem.v1.Inference ({details}); is it the gRPC address of a Tandem router?"
    return details


def _seconds(value: object) -> float | None:
    try:
        return float(str(value)) if value is not None else None
    except ValueError:
        return None
