"""The gRPC front: `Inference` over a FrontDoor, and the read-only side of `Cluster` from what the router follows."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NoReturn

import grpc

from core.errors import InternalError, InvalidRequestError, TandemError
from core.request import Slo
from core.wire import finish_to_pb, sampling_from_pb
from router import explain, spans
from router.explain import explanation_to_pb, placement_to_pb, timing_to_pb
from router.frontend_types import (
    ChatMessage,
    ChatPrompt,
    ChoiceFinished,
    Finished,
    FrontDoor,
    FrontRequest,
    Part,
    Started,
    Token,
    TokenBatch,
)
from router.replicas import ASKED_BY_ROUTER, Alone, Peers
from tandem.v1 import cluster_pb2, cluster_pb2_grpc, inference_pb2_grpc
from tandem.v1 import inference_pb2 as pb

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """`peers`: the other routers, asked about requests that are not this one's."""

    def __init__(self, front: FrontDoor, peers: Peers | None = None) -> None:
        self._front = front
        self._peers = peers or Alone()

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:
        """Writes through the context instead of yielding: so a client that hangs up ends the request in this frame, at
        once, and not when an abandoned generator is collected."""
        explained: _Explained | None = None
        try:
            asked = replace(request_from_pb(request), traceparent=_metadata(context, spans.HEADER))
            explained = _Explained(self._front, context, asked.request_id) if _asks_why(context) else None
            async with contextlib.aclosing(self._front.generate(asked)) as parts:
                async for part in parts:
                    if explained is not None:
                        explained.saw(part)
                    await context.write(part_to_pb(part))
        except TandemError as error:
            await _abort(context, error, explained.line() if explained is not None else None)
        except grpc.aio.BaseError as error:  # of writing: the client has gone, nobody is left to tell
            log.debug("request %s: its client went away: %s", request.request_id, error)
        except Exception:
            log.exception("request %s failed", request.request_id)
            await _abort(context, InternalError("the router made a mistake on this request; its log says which"))

    async def Cancel(self, request: pb.CancelRequest, context: Context) -> pb.CancelResponse:
        found = self._front.cancel(request.request_id)
        if not found and not _passed_on(context):
            found = await self._peers.cancel(request.request_id)
        return pb.CancelResponse(found=found)

    async def Explain(self, request: pb.ExplainRequest, context: Context) -> pb.ExplainResponse:
        try:
            return explanation_to_pb(self._front.explain(request.request_id))
        except TandemError as error:
            if not _passed_on(context) and (elsewhere := await self._peers.explain(request.request_id)) is not None:
                return elsewhere
            await _abort(context, error)

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        try:
            card = self._front.model()
        except TandemError as error:
            await _abort(context, error)
        return pb.GetModelResponse(
            name=card.name,
            version=card.version,
            max_model_len=card.max_model_len,
            vocab_size=card.vocab_size,
            fingerprint=card.fingerprint,
            dtype=card.dtype,
        )


class _Explained:
    """Sets the trailing metadata that a call asked for, when it ends."""

    def __init__(self, front: FrontDoor, context: Context, request_id: str) -> None:
        """`request_id`: what the call named; empty until the front has named it."""
        self._front = front
        self._context = context
        self._request_id = request_id

    def saw(self, part: Part) -> None:
        if isinstance(part, Started):
            self._request_id = part.request_id
        elif isinstance(part, Finished) and (line := self.line()) is not None:
            self._context.set_trailing_metadata(((explain.HEADER, line),))

    def line(self) -> str | None:
        """What is known by now."""
        return explain.header_of(self._front, self._request_id)


def _asks_why(context: Context) -> bool:
    return explain.wanted(_metadata(context, explain.HEADER))


def _metadata(context: Context, name: str) -> str:
    """Empty where the call has none of that name."""
    return next((str(value) for key, value in context.invocation_metadata() or () if key == name), "")


def _passed_on(context: Context) -> bool:
    """By another router, which asks the others itself."""
    return any(key == ASKED_BY_ROUTER for key, _ in context.invocation_metadata() or ())


class StatusServicer(cluster_pb2_grpc.ClusterServicer):
    """`tandem status` against a router: what it last heard from the controller. Everything else is the admin port's."""

    def __init__(self, status: Callable[[], cluster_pb2.ClusterSnapshot]) -> None:
        self._status = status

    async def GetStatus(self, request: cluster_pb2.GetStatusRequest, context: Context) -> cluster_pb2.ClusterSnapshot:
        return self._status()


def request_from_pb(request: pb.GenerateRequest) -> FrontRequest:
    """Raises InvalidRequestError without any input; a prompt that is empty, too long or foreign is the front's to refuse."""
    kind = request.WhichOneof("input")
    if kind is None:
        raise InvalidRequestError("the request has no input; send text, token_ids or chat")
    prompt: str | tuple[int, ...] | ChatPrompt
    if kind == "chat":
        prompt = ChatPrompt(tuple(ChatMessage(m.role, m.content) for m in request.chat.messages))
    else:
        prompt = tuple(request.token_ids.ids) if kind == "token_ids" else request.text

    def limit(name: str) -> float | None:
        return getattr(request, name) if request.HasField(name) else None

    return FrontRequest(
        prompt=prompt,
        sampling=sampling_from_pb(request.sampling),
        request_id=request.request_id,
        slo_class=request.slo_class,
        slo=Slo(limit("ttft_slo_s"), limit("tbt_slo_s"), limit("tpot_slo_s")),
        priority=request.priority,
        echo=request.echo,
        tenant=request.tenant,
        deadline_s=limit("deadline_s"),
    )


def part_to_pb(part: Part) -> pb.GenerateResponse:
    match part:
        case TokenBatch(tokens):
            return _tokens_to_pb(tokens)
        case Started(request_id, prompt_tokens, seed, prompt_text):
            started = pb.Started(request_id=request_id, prompt_tokens=prompt_tokens, seed=seed, prompt_text=prompt_text)
            return pb.GenerateResponse(started=started)
        case ChoiceFinished(choice, reason, tail):
            ended = pb.ChoiceFinished(choice=choice, finish_reason=finish_to_pb(reason), tail_text=tail)
            return pb.GenerateResponse(choice_finished=ended)
        case Finished():
            return pb.GenerateResponse(finished=_finished_to_pb(part))


def _tokens_to_pb(tokens: tuple[Token, ...]) -> pb.GenerateResponse:
    """Runs per token and message: fields are set in place, because a message given to another one is copied."""
    message = pb.GenerateResponse()
    add = message.tokens.tokens.add
    for token in tokens:
        added = add(choice=token.choice, position=token.position, token_id=token.token_id, text=token.text)
        if token.logprob is not None:
            added.logprob = token.logprob
            for token_id, logprob in token.top_logprobs:
                added.top_logprobs.add(token_id=token_id, logprob=logprob)
    return message


def _finished_to_pb(part: Finished) -> pb.Finished:
    usage = part.usage
    return pb.Finished(
        usage=pb.Usage(
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            completion_tokens=usage.completion_tokens,
        ),
        timing=timing_to_pb(part.timing),
        placement=placement_to_pb(part.placement),
        failovers=part.failovers,
    )


async def _abort(context: Context, error: TandemError, why: str | None = None) -> NoReturn:
    """Ends the call with the error's status; its code, when to retry and, where it is wanted, `why` travel in the trailing
    metadata."""
    metadata = [("tandem-code", error.code)] + ([(explain.HEADER, why)] if why is not None else [])
    if error.retry_after_s is not None:
        metadata.append(("tandem-retry-after-s", f"{error.retry_after_s:g}"))
    context.set_trailing_metadata(tuple(metadata))
    await context.abort(getattr(grpc.StatusCode, error.grpc_status), error.message)
    raise AssertionError("abort raises")
