"""The OpenAI-compatible HTTP front: a thin translation of `FrontDoor.generate`.

`/v1/completions`, `/v1/chat/completions` (whole or as server-sent events), `/v1/models`, `/health`, `/ready`, `/metrics`,
`/metrics/targets`.
Every error has OpenAI's body, `{"error": {"message", "type", "param", "code"}}`; one that comes after the first byte of a
stream is sent as an event of that shape. A client that goes away cancels its request everywhere.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Protocol

from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from core.errors import NotFoundError, TandemError, UnavailableError
from router import explain
from router.frontend_types import FrontDoor, ModelCard, Started
from router.http_body import read_body, while_connected
from router.http_errors import not_served, raised, response_of
from router.http_events import EventWriter, SlowClientError
from router.http_merge import Numbered, merged
from router.openai_headers import with_headers, with_trace
from router.openai_replies import Json, Reply
from router.openai_types import ApiCall, read_chat, read_completion
from router.sse import EventStream

_Why = Callable[[], str | None]


class TokenNames(Protocol):
    """What is needed of `core.text.Tokenizer`, for showing log-probabilities."""

    def token_bytes(self, token_id: int) -> bytes: ...


def build_app(
    front: FrontDoor,
    names: TokenNames,
    metrics: Callable[[], bytes],
    max_body_bytes: int,
    targets: Callable[[], list[Json]] = list,
    new_id: Callable[[], str] = lambda: uuid.uuid4().hex,
) -> Starlette:
    """The ASGI application. `metrics` renders the Prometheus page, `targets` lists every process that has one; a larger
    body than `max_body_bytes` is refused. `new_id` names requests that came without an id.
    """
    small = _SmallDoors(front, metrics, targets)
    completions = _Generation(front, names, max_body_bytes, read_completion, new_id)
    chats = _Generation(front, names, max_body_bytes, read_chat, new_id)
    return Starlette(
        routes=[
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/chat/completions", chats, methods=["POST"]),
            Route("/v1/models", small.models, methods=["GET"]),
            Route("/v1/models/{name:path}", small.model, methods=["GET"]),
            Route("/health", small.health, methods=["GET"]),
            Route("/ready", small.ready, methods=["GET"]),
            Route("/metrics", small.metrics, methods=["GET"]),
            Route("/metrics/targets", small.targets, methods=["GET"]),
        ],
        exception_handlers={HTTPException: not_served, TandemError: raised, Exception: raised},
    )


class _SmallDoors:
    def __init__(self, front: FrontDoor, metrics: Callable[[], bytes], targets: Callable[[], list[Json]]) -> None:
        self._front = front
        self._metrics = metrics
        self._targets = targets
        self._created = int(time.time())

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._entry(self._front.model())]})

    async def model(self, request: Request) -> Response:
        card = self._front.model()
        _check_model(request.path_params["name"], card)
        return JSONResponse(self._entry(card))

    async def health(self, request: Request) -> Response:
        """The process lives."""
        return JSONResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """Requests can be served."""
        if not self._front.ready():
            raise UnavailableError("no pair of workers is connected yet; retry in a moment", retry_after_s=1.0)
        return JSONResponse({"status": "ready"})

    async def metrics(self, request: Request) -> Response:
        return Response(self._metrics(), headers={"content-type": CONTENT_TYPE_LATEST})

    async def targets(self, request: Request) -> Response:
        """Every process of the cluster that can be scraped, in the form of Prometheus' HTTP service discovery."""
        return JSONResponse(self._targets())

    def _entry(self, card: ModelCard) -> Json:
        return {
            "id": card.name,
            "object": "model",
            "created": self._created,
            "owned_by": "tandem",
            "max_model_len": card.max_model_len,
        }


class _Generation:
    """An ASGI application of its own rather than a Starlette endpoint, because it watches for the client leaving."""

    def __init__(
        self,
        front: FrontDoor,
        names: TokenNames,
        max_body_bytes: int,
        read_call: Callable[[bytes], ApiCall],
        new_id: Callable[[], str],
    ) -> None:
        self._front = front
        self._names = names
        self._max_body_bytes = max_body_bytes
        self._read_call = read_call
        self._new_id = new_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = self._new_id()
        try:
            call = self._read_call(await read_body(scope, receive, self._max_body_bytes))
            call = with_headers(call, scope["headers"])
            call = with_trace(call, scope["headers"])
            card = self._front.model()
            _check_model(call.model, card)
        except TandemError as error:
            await response_of(error, request_id)(scope, receive, send)
            return
        call, request_id = _named(call, request_id)
        reply = Reply(call, card, request_id, int(time.time()), self._names.token_bytes)
        why = self._why(scope, call.requests[0].request_id)
        answer = _Answer(call, reply, request_id, why, merged([self._front.generate(r) for r in call.requests]))
        await while_connected(receive, answer.stream(send) if call.stream else answer.whole(scope, receive, send))

    def _why(self, scope: Scope, request_id: str) -> _Why:
        """What the explaining header says when it is asked for: as much as is known then."""
        name = explain.HEADER.encode()
        asked = any(key == name and explain.wanted(value.decode("latin-1")) for key, value in scope["headers"])
        return lambda: explain.header_of(self._front, request_id) if asked else None


def _named(call: ApiCall, request_id: str) -> tuple[ApiCall, str]:
    """The call with an id for each of its requests, chosen here so that even a refusal can name it."""
    if call.requests[0].request_id:
        return call, call.requests[0].request_id
    if len(call.requests) == 1:
        return replace(call, requests=(replace(call.requests[0], request_id=request_id),)), request_id
    named = tuple(replace(one, request_id=f"{request_id}-{i}") for i, one in enumerate(call.requests))
    return replace(call, requests=named), request_id


class _ModelNotFoundError(NotFoundError):
    code, param = "model_not_found", "model"


def _check_model(name: str, card: ModelCard) -> None:
    if name != card.name:
        raise _ModelNotFoundError(f"the model `{name}` does not exist; this server has `{card.name}`")


class _Answer:
    """One call being answered."""

    def __init__(self, call: ApiCall, reply: Reply, request_id: str, why: _Why, parts: AsyncGenerator[Numbered, None]) -> None:
        self._call = call
        self._reply = reply
        self._request_id = request_id
        self._why = why
        self._parts = parts

    async def whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with aclosing(self._parts) as parts:
                async for prompt, part in parts:
                    self._reply.add(prompt, part)
            why = self._why()
            headers = {"x-request-id": self._request_id} | ({explain.HEADER: why} if why is not None else {})
            response = JSONResponse(self._reply.whole(), headers=headers)
        except Exception as error:
            response = response_of(error, self._request_id, self._why())
        await response(scope, receive, send)

    async def stream(self, send: Send) -> None:
        """Server-sent events. The status is decided by what comes first: the request's acceptance, or its error."""
        stream = EventStream(self._reply)
        with EventWriter(send, self._request_id, self._why) as events:
            try:
                async with aclosing(self._parts) as parts:
                    async for prompt, part in parts:
                        if isinstance(part, Started):
                            await events.open()
                        await events.send(stream.events(prompt, part))
                await events.close(stream.closing())
            except SlowClientError:
                return  # without an end: the server closes the connection
            except Exception as error:
                await events.fail(error)
