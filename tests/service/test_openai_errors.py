"""What bad HTTP input gets: a status, OpenAI's error body naming the field, bounded memory, and a server that goes on."""

from __future__ import annotations

import asyncio
import json
import resource
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from scripted_front import MAX_BODY_BYTES, ScriptedFront, serving

OK = {"model": "demo", "prompt": "go"}
CHAT = {"model": "demo", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
def front() -> ScriptedFront:
    return ScriptedFront()


@pytest.fixture
async def http(front: ScriptedFront) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(front) as url, httpx.AsyncClient(base_url=url, timeout=30.0, verify=False) as client:
        yield client
        answer = await client.post("/v1/completions", json=OK)
        assert answer.status_code == 200, "the server does not serve any more"


def error_of(answer: httpx.Response) -> dict[str, Any]:
    assert set(answer.json()) == {"error"}
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "Traceback" not in answer.text
    return error


async def test_a_bad_field_is_named(http: httpx.AsyncClient) -> None:
    answer = await http.post("/v1/completions", json=OK | {"temperature": -1, "stream": True})
    error = error_of(answer)
    assert (answer.status_code, error["param"], error["type"]) == (400, "temperature", "invalid_request_error")
    assert answer.headers["x-request-id"]
    answer = await http.post("/v1/chat/completions", json=CHAT | {"tools": [{}]})
    assert (answer.status_code, error_of(answer)["param"]) == (400, "tools")


async def test_a_body_that_is_no_json(http: httpx.AsyncClient) -> None:
    for body in (b"", b"{", b'{"prompt": "\xff\xfe"}'):
        answer = await http.post("/v1/completions", content=body)
        assert (answer.status_code, error_of(answer)["type"]) == (400, "invalid_request_error")


MISSING = [
    ("GET", "/", 404),
    ("GET", "/v1/nothing", 404),
    ("GET", "/v1/completions", 405),
    ("DELETE", "/v1/chat/completions", 405),
    ("POST", "/health", 405),
    ("GET", "/v1/models/other", 404),
]


async def test_paths_and_methods_that_are_not_there(http: httpx.AsyncClient) -> None:
    for method, path, status in MISSING:
        answer = await http.request(method, path)
        assert answer.status_code == status
        error_of(answer)
        assert ("allow" in answer.headers) == (status == 405)


async def test_the_small_endpoints(http: httpx.AsyncClient, front: ScriptedFront) -> None:
    assert (await http.get("/health")).json() == {"status": "ok"}
    assert (await http.get("/ready")).status_code == 200
    metrics = await http.get("/metrics")
    assert (metrics.text, metrics.headers["content-type"].split(";")[0]) == ("tandem_up 1\n", "text/plain")
    front.serving = False
    refused = await http.get("/ready")
    assert (refused.status_code, refused.headers["retry-after"], error_of(refused)["code"]) == (503, "1", "unavailable")
    assert (await http.get("/v1/models")).headers["retry-after"] == "2"
    assert (await http.get("/health")).status_code == 200
    front.serving = True


async def body_of(num_bytes: int) -> AsyncIterator[bytes]:
    piece = b" " * 65_536
    for _ in range(num_bytes // len(piece)):
        yield piece


@pytest.mark.parametrize("announced", [True, False])
async def test_a_body_of_100_mb_is_refused_in_bounded_memory(http: httpx.AsyncClient, announced: bool) -> None:
    num_bytes = 100 * 2**20
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    headers = {"content-length": str(num_bytes)} if announced else {}
    answer = await http.post("/v1/completions", content=body_of(num_bytes), headers=headers)
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
    error = error_of(answer)
    assert (answer.status_code, error["code"]) == (413, "request_too_large")
    assert str(MAX_BODY_BYTES) in error["message"]
    assert grown_kib < 30 * 1024


async def raw(url: str, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(httpx.URL(url).host, httpx.URL(url).port)
    try:
        writer.write(request)
        await writer.drain()
        return await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20.0)
    finally:
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize("length", [b"104857600", b"9" * 40])
async def test_a_client_that_asks_before_sending_is_told_at_once(front: ScriptedFront, length: bytes) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: " + length + b"\r\n\r\n"
    async with serving(front) as url:
        assert (await raw(url, head)).split()[1] in (b"413", b"400")
    assert not front.requests


async def test_exactly_the_limit_is_read(http: httpx.AsyncClient) -> None:
    body = json.dumps(OK).encode()
    answer = await http.post("/v1/completions", content=body + b" " * (MAX_BODY_BYTES - len(body)))
    assert answer.status_code == 200


async def test_a_client_that_never_finishes_its_body_is_forgotten(front: ScriptedFront) -> None:
    async with serving(front) as url:
        _, writer = await asyncio.open_connection(httpx.URL(url).host, httpx.URL(url).port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{")
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        async with httpx.AsyncClient(base_url=url, verify=False) as client:
            assert (await client.post("/v1/completions", json=OK)).status_code == 200
    assert len(front.requests) == 1


async def test_a_client_that_reads_nothing_is_cut_off(front: ScriptedFront, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.http_events.WRITE_TIMEOUT_S", 0.2)
    body = json.dumps(OK | {"prompt": "flood", "stream": True}).encode()
    async with serving(front) as url:
        _, writer = await asyncio.open_connection(httpx.URL(url).host, httpx.URL(url).port, limit=1024)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        await asyncio.wait_for(front.closed.wait(), 20.0)
        writer.close()
