"""The benchmark's HTTP client against servers that answer in pieces, refuse, break off, or say nothing."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from cli.load import Job
from cli.targets import Asked, open_http
from tandem.errors import DeadlineExceededError, InvalidRequestError, OverloadedError, TandemError, UnavailableError

JOB = Job(0.0, 5, 3, 1)
MODELS = json.dumps({"data": [{"id": "demo"}]}).encode()
Pieces = list[bytes]


def plain(status: str, body: bytes) -> Pieces:
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return [head.encode() + body]


def streamed(*events: object, end: bool = True) -> bytes:
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + ("data: [DONE]\n\n" if end else "")
    chunk = f"{len(body.encode()):x}\r\n{body}\r\n" + ("0\r\n\r\n" if end else "")
    return b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk.encode()


def text(value: str) -> dict[str, object]:
    return {"choices": [{"text": value}]}


@asynccontextmanager
async def server(answer: Pieces, hang: bool = False) -> AsyncIterator[str]:
    """Lists one model; answers a completion with these pieces, each sent on its own, and then closes."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            for piece in plain("200 OK", MODELS) if b"/v1/models" in head else answer:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)
            if hang and b"/v1/models" not in head:
                await reader.read(-1)
        finally:
            writer.close()

    listener = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with listener:
        yield f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/v1"


async def ask(url: str, timeout_s: float = 10.0) -> int:
    async with open_http(url, Asked(timeout_s)) as target:
        return sum([count async for count in target.answer(JOB)])


@pytest.mark.parametrize("url", ["ftp://host", "http://", "https:///v1", "http://host:99999", "http://host:x"])
async def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(InvalidRequestError, match="--url must look like"):
        await ask(url)


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_server_that_says_nothing_at_all_is_nobody(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cli.targets.CONNECT_TIMEOUT_S", 0.3)
    gone = asyncio.Event()

    async def keep_silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(-1)
        writer.close()
        gone.set()

    listener = await asyncio.start_server(keep_silent, "127.0.0.1", 0)
    async with listener:
        with pytest.raises(UnavailableError, match=r"did not say|nobody answers"):
            await ask(f"{scheme}://127.0.0.1:{listener.sockets[0].getsockname()[1]}")
        await asyncio.wait_for(gone.wait(), 10)


async def test_a_stream_counts_chunks_with_text_however_it_is_cut() -> None:
    whole = streamed(text("a"), text(""), text("b"), {"choices": [], "usage": {}}, text("é"))
    for size in (1, 7, len(whole)):
        async with server([whole[at : at + size] for at in range(0, len(whole), size)]) as url:
            assert await ask(url) == 3


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        ("429 Too Many Requests", OverloadedError),
        ("503 Service Unavailable", UnavailableError),
        ("504 Gateway Timeout", DeadlineExceededError),
        ("400 Bad Request", InvalidRequestError),
        ("500 Internal Server Error", TandemError),
    ],
)
async def test_a_refusal_keeps_its_kind_and_words(status: str, kind: type[TandemError]) -> None:
    async with server(plain(status, b'{"error": {"message": "the words"}}')) as url:
        with pytest.raises(kind, match="the words"):
            await ask(url)


async def test_an_answer_that_is_no_json_is_still_an_error_with_its_words() -> None:
    async with server(plain("502 Bad Gateway", b"<html>proxy</html>")) as url:
        with pytest.raises(TandemError, match="proxy"):
            await ask(url)


async def test_an_error_in_mid_stream_is_an_error() -> None:
    async with server([streamed(text("a"), {"error": {"message": "lost its worker"}})]) as url:
        with pytest.raises(TandemError, match="lost its worker"):
            await ask(url)


async def test_a_connection_that_breaks_off_is_an_error() -> None:
    async with server([streamed(text("a"), end=False)]) as url:
        with pytest.raises(UnavailableError, match="broke"):
            await ask(url)


def until_closed(body: str) -> Pieces:
    """An event stream that ends where the connection does."""
    return [b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + body.encode()]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("data: <html>\n\n", "no JSON object: <html>"),
        ("data: 7\n\n", "no JSON object: 7"),
        ('data: {"choices": [{"text": "a"}]}\n\n', r"ended without \[DONE\]"),
        ('data: {"choices": [{"text": "a"}]}\n\ndata: {"cho', r"ended without \[DONE\]"),
        ("\x00\xff garbage", r"ended without \[DONE\]"),
    ],
)
async def test_a_stream_of_garbage_or_of_half_an_answer_is_an_error(body: str, said: str) -> None:
    async with server(until_closed(body)) as url:
        with pytest.raises(UnavailableError, match=said):
            await ask(url)


async def test_a_stream_that_names_its_end_is_whole_and_strange_choices_hold_no_token() -> None:
    events = [text("a"), {"choices": None}, {"choices": [7]}, {"choices": [{"text": "b", "finish_reason": "length"}]}]
    async with server(until_closed("".join(f"data: {json.dumps(event)}\n\n" for event in events))) as url:
        assert await ask(url) == 2


@pytest.mark.parametrize("models", [b"[]", b"7", b'{"data": []}', b'{"data": [{}]}', b"<html>", b'{"data": {"id": 1}}'])
async def test_who_lists_no_model_is_no_server_of_this_kind(models: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "MODELS", models)
    async with server([streamed(text("a"))]) as url:
        with pytest.raises(TandemError, match=r"no OpenAI-compatible server|html"):
            await ask(url)


async def test_a_context_that_is_no_number_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "MODELS", b'{"data": [{"id": "m", "max_model_len": "long"}]}')
    async with server([]) as url, open_http(url, Asked(1.0)) as target:
        assert target.context_max is None


async def test_a_server_that_stops_talking_runs_into_the_deadline() -> None:
    async with server([streamed(text("a"), end=False)], hang=True) as url:
        with pytest.raises(DeadlineExceededError, match=r"within 0\.2 s"):
            await ask(url, timeout_s=0.2)


@pytest.mark.parametrize(
    "make", [lambda url: url, lambda url: url.removesuffix("/v1"), lambda url: url.removeprefix("http://")]
)
async def test_an_address_may_be_given_in_any_usual_form(make: Callable[[str], str]) -> None:
    async with server([streamed(text("a"))]) as url:
        assert await ask(make(url)) == 1
