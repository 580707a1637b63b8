"""What a benchmark can be pointed at: a Tandem cluster over gRPC, or anything with an OpenAI-compatible URL."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import SplitResult, urlsplit

import h11

from cli.load import Job, prompt_of
from core.request import Slo
from tandem import AsyncClient, SamplingParams
from tandem._convert import RequestOptions
from tandem.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    OverloadedError,
    TandemError,
    UnavailableError,
)
from tandem.results import Model

CONNECT_TIMEOUT_S = 10.0
_READ_BYTES = 65_536
SHOWN_MAX = 120
"""Characters of an answer that an error repeats."""
TOKEN_IDS = range(300, 4000)
"""Ordinary tokens in every vocabulary: what prompts of ids are made of where the vocabulary is not known."""
_WORDS = ("def", "self", "return", "value", "index", "for", "in", "range", "if", "None", "import", "class", "name", "error")


@dataclass(frozen=True, slots=True)
class Asked:
    """What every request asks for: an answer within `timeout_s`, and of Tandem the limits and the class it is told of.
    `api_key`: whose request it is; empty where nobody asks."""

    timeout_s: float
    api_key: str = ""
    slo: Slo = field(default_factory=Slo)
    slo_class: str = ""

    def fields(self) -> dict[str, float | str]:
        limits = {"ttft_slo_s": self.slo.ttft_s, "tbt_slo_s": self.slo.tbt_s, "tpot_slo_s": self.slo.tpot_s}
        given: dict[str, float | str] = {name: limit for name, limit in limits.items() if limit is not None}
        return given | ({"slo_class": self.slo_class} if self.slo_class else {})


class GrpcTarget:
    """Prompts are random token ids, so that their length is exact."""

    def __init__(self, client: AsyncClient, model: Model, asked: Asked) -> None:
        self._client = client
        self._vocabulary = range(model.vocab_size)
        self._asked = asked
        self.context_max: int | None = model.max_model_len

    async def answer(self, job: Job) -> AsyncIterator[int]:
        prompt = prompt_of(job, self._vocabulary)
        sampling = SamplingParams(max_tokens=job.max_tokens, temperature=0.0, ignore_eos=True)
        options = cast(RequestOptions, self._asked.fields())
        async with self._client.stream(prompt, sampling, timeout_s=self._asked.timeout_s, **options) as stream:
            async for token in stream:
                if token.token_id >= 0:
                    yield 1


@asynccontextmanager
async def open_grpc(address: str, asked: Asked) -> AsyncIterator[GrpcTarget]:
    """Raises UnavailableError when nobody answers there."""
    async with AsyncClient(address, asked.api_key or None, max_retries=0) as client:
        yield GrpcTarget(client, await client.model(), asked)


class HttpTarget:
    """`POST /v1/completions` with streaming. A chunk with text counts as one token. Prompts are words, about one token each,
    or token ids for servers that take them."""

    def __init__(self, base: SplitResult, model: dict[str, Any], asked: Asked, ids: bool) -> None:
        self._base = base
        self._model = str(model["id"])
        self._asked = asked
        self._ids = ids
        self.context_max: int | None = model.get("max_model_len")

    async def answer(self, job: Job) -> AsyncIterator[int]:
        async with aclosing(self.stream(self.body(job))) as events:
            async for event in events:
                if any(choice.get("text") for choice in _choices(event)):
                    yield 1

    def body(self, job: Job) -> dict[str, Any]:
        return {
            "model": self._model,
            "prompt": prompt_of(job, TOKEN_IDS) if self._ids else " ".join(prompt_of(job, _WORDS)),
            "max_tokens": job.max_tokens,
            "temperature": 0.0,
            "stream": True,
            "ignore_eos": True,
            **self._asked.fields(),
        }

    async def stream(self, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """Sends `body` and yields the objects of the answer. Raises TandemError, DeadlineExceededError after the timeout."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._asked.timeout_s
        async with aclosing(_events(self._base, "/v1/completions", body, self._asked.api_key)) as events:
            while True:
                try:
                    async with asyncio.timeout_at(deadline):
                        event = await anext(events)
                except StopAsyncIteration:
                    return
                except TimeoutError:
                    raise DeadlineExceededError(f"no complete answer within {self._asked.timeout_s:g} s") from None
                yield event


@asynccontextmanager
async def open_http(url: str, asked: Asked, ids: bool = False) -> AsyncIterator[HttpTarget]:
    """`url` is the server's root, with or without `/v1`. Raises UnavailableError when nobody answers there."""
    base = urlsplit(url if "://" in url else f"http://{url}")
    if base.scheme not in ("http", "https") or not base.hostname or not _has_port(base):
        raise InvalidRequestError(f"--url must look like http://HOST:PORT or https://HOST, got {url!r}")
    base = base._replace(path=base.path.rstrip("/").removesuffix("/v1"))
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S), aclosing(_events(base, "/v1/models", None, asked.api_key)) as events:
            models: dict[str, Any] = await anext(events, {})
    except TimeoutError:
        raise UnavailableError(f"{url} did not say within {CONNECT_TIMEOUT_S:g} s which models it has") from None
    yield HttpTarget(base, _model_of(models, url), asked, ids)


def _has_port(base: SplitResult) -> bool:
    try:
        return base.port is None or base.port > 0
    except ValueError:
        return False


def _model_of(models: dict[str, Any], url: str) -> dict[str, Any]:
    """The first of what `GET /v1/models` answered."""
    listed = models.get("data")
    first = listed[0] if isinstance(listed, list) and listed else None
    if not isinstance(first, dict) or "id" not in first:
        raise UnavailableError(f"{url} is no OpenAI-compatible server: GET /v1/models answered {_shown(models)}")
    context = first.get("max_model_len")
    return first if type(context) is int and context > 1 else first | {"max_model_len": None}


def _choices(event: dict[str, Any]) -> list[dict[str, Any]]:
    found = event.get("choices")
    return [choice for choice in found if isinstance(choice, dict)] if isinstance(found, list) else []


def _shown(answer: Any) -> str:
    text = json.dumps(answer) if not isinstance(answer, bytes) else answer.decode(errors="replace")
    return text if len(text) <= SHOWN_MAX else f"{text[:SHOWN_MAX]}…"


async def _events(
    base: SplitResult, path: str, body: dict[str, Any] | None, api_key: str
) -> AsyncGenerator[dict[str, Any], None]:
    """JSON objects of an answer: each `data:` line of an event stream, or the one object of a plain answer."""
    secure = base.scheme == "https"
    host, port = base.hostname or "", base.port or (443 if secure else 80)
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(host, port, ssl=secure or None)
    except (OSError, TimeoutError) as error:
        raise UnavailableError(f"nobody answers at {host}:{port}: {error}") from None
    try:
        connection = h11.Connection(h11.CLIENT)
        data = b"" if body is None else json.dumps(body).encode()
        headers = [("Host", f"{host}:{port}"), ("Content-Type", "application/json"), ("Content-Length", str(len(data)))]
        headers += [("Authorization", f"Bearer {api_key}")] if api_key else []
        head = h11.Request(method="GET" if body is None else "POST", target=base.path + path, headers=headers)
        for event in (head, h11.Data(data=data), h11.EndOfMessage()):
            writer.write(connection.send(event) or b"")
        async for found in _parse(connection, reader):
            yield found
    except (OSError, h11.RemoteProtocolError) as error:
        raise UnavailableError(f"the connection to {host}:{port} broke: {error}") from None
    finally:
        writer.close()


async def _parse(connection: h11.Connection, reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """Raises UnavailableError for a stream that holds no JSON, or ends before its last event."""
    status, streaming, pending, ended = 0, False, b"", False
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(_READ_BYTES))
        elif isinstance(event, h11.Response):
            status = event.status_code
            streaming = status == 200 and dict(event.headers).get(b"content-type", b"").startswith(b"text/event-stream")
        elif isinstance(event, h11.Data):
            pending += event.data
            while streaming and b"\n" in pending:
                line, _, pending = pending.partition(b"\n")
                if line.startswith(b"data:") and line[5:].strip() == b"[DONE]":
                    ended = True
                elif line.startswith(b"data:"):
                    found = _streamed(line[5:])
                    ended = ended or any(choice.get("finish_reason") for choice in _choices(found))
                    yield found
        elif isinstance(event, h11.EndOfMessage | h11.ConnectionClosed):
            break
    if streaming and not ended:
        raise UnavailableError("the stream broke off: it ended without [DONE]")
    if not streaming:
        found = _json(pending)
        if status != 200:
            raise _error(status, found)
        yield found


def _streamed(data: bytes) -> dict[str, Any]:
    """One event of a stream."""
    try:
        found = json.loads(data)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UnavailableError(f"the stream holds what is no JSON object: {_shown(data.strip())}")
    if "error" in found:
        raise _error(500, found)
    return found


def _json(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"error": {"message": data[:200].decode(errors="replace")}}


def _error(status: int, body: dict[str, Any]) -> TandemError:
    detail = body.get("error")
    message = detail.get("message", "") if isinstance(detail, dict) else str(detail)
    kind = {429: OverloadedError, 503: UnavailableError, 504: DeadlineExceededError}.get(status, TandemError)
    if status in (400, 404, 422):
        kind = InvalidRequestError
    return kind(message or f"HTTP status {status}")
