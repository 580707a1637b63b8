"""Spans of real requests reach a collector over HTTP, and a collector that is gone harms nobody."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import httpx
import pytest
from router_rig import PROMPT, rig
from test_explain import doors

from router.explain import header_of
from router.span_export import WAITING_MAX, SpanExporter
from tandem.v1 import inference_pb2, inference_pb2_grpc

pytestmark = pytest.mark.service

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@asynccontextmanager
async def collector(status: str = "200 OK") -> AsyncIterator[tuple[str, list[dict]]]:
    """An OTLP endpoint over HTTP: its address, and what it was sent."""
    taken: list[dict] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = next(int(line.split(":")[1]) for line in head.splitlines() if line.startswith("content-length:"))
        taken.append(json.loads(await reader.readexactly(length)))
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{{}}".encode())
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/traces", taken


async def test_requests_of_both_doors_are_spans_of_their_callers_traces():
    async with collector() as (url, taken), rig() as r, doors(r) as (address, web):
        spans = SpanExporter(url, "router-0")
        r.front._on_end = lambda request, request_id, took_s: spans.ended(
            request_id, request.traceparent, took_s, lambda: header_of(r.front, request_id)
        )
        async with grpc.aio.insecure_channel(address) as channel:
            wanted = inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=PROMPT), request_id="g")
            wanted.sampling.max_tokens = 4
            stub = inference_pb2_grpc.InferenceStub(channel)
            async for _ in stub.Generate(wanted, metadata=(("traceparent", f"00-{TRACE}-{SPAN}-01"),)):
                pass
        async with httpx.AsyncClient(base_url=f"http://{web}") as http:
            name = (await http.get("/v1/models")).json()["data"][0]["id"]
            body = {"model": name, "prompt": list(PROMPT), "max_tokens": 4}
            for flag in ("01", "00"):
                await http.post("/v1/completions", json=body, headers={"traceparent": f"00-{TRACE}-{SPAN}-{flag}"})
            await http.post("/v1/completions", json=body)
        await r.until(lambda: r.front.live == 0)
        await spans.flush()
        found = taken[0]["resourceSpans"][0]["scopeSpans"][0]["spans"]
        assert spans.sent == len(found) == 3, "one of them asked not to be sampled"
        assert [one.get("parentSpanId") for one in found] == [SPAN, SPAN, None]
        assert found[0]["traceId"] == TRACE != found[2]["traceId"]
        values = {each["key"]: next(iter(each["value"].values())) for each in found[0]["attributes"]}
        assert (values["tandem.placement.prefill"], values["tandem.placement.decode"]) == ("prefill-0", "decode-0")
        assert json.loads(values["tandem.explain"])["request_id"] == "g"
        assert int(found[0]["startTimeUnixNano"]) < int(found[0]["endTimeUnixNano"])


@pytest.mark.parametrize("status", [None, "503 Service Unavailable"])
async def test_what_a_collector_does_not_take_is_dropped_and_counted(status: str | None):
    async with collector(status or "200 OK") as (url, _):
        spans = SpanExporter(url if status else "http://127.0.0.1:1/v1/traces", "router-0")
        for number in range(WAITING_MAX + 5):
            spans.ended(f"r{number}", "", 0.1, lambda: None)
        assert spans.dropped == 5
        await spans.flush()
        assert (spans.sent, spans.dropped > 5) == (0, True)
