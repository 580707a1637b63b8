"""The front's own gRPC server against gRPC's clients, and against clients that mean it no good, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from hpack import Encoder
from worker_harness import until

from core import http2_frames as h2
from core.front_server import FrontServer
from core.http2 import RESETS_MAX
from core.service import Registration
from tandem.v1 import inference_pb2 as pb
from tandem.v1 import inference_pb2_grpc as stubs

pytestmark = pytest.mark.service

BYTES_MAX = 4 * 2**20
DEADLINE_S = 20.0


class Echo(stubs.InferenceServicer):
    """`Generate` does what the text says; `Explain` tells how it was called; `Cancel` waits for ever."""

    def __init__(self) -> None:
        self.written = self.ended = self.running = 0  # `written`: of long messages

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> None:
        self.running += 1
        word, _, number = request.text.partition(" ")
        try:
            if word == "count":
                for position in range(int(number)):
                    message = pb.GenerateResponse()
                    message.tokens.tokens.add(position=position, text="x" * request.priority)
                    await context.write(message)
                    self.written += request.priority > 0
                    await asyncio.sleep(0)
            elif word == "size":
                await context.write(pb.GenerateResponse(started=pb.Started(prompt_tokens=len(number))))
            elif word == "abort":
                context.set_trailing_metadata((("why", "asked"),))
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "100 % of “it”\n")
            elif word == "break":
                raise ZeroDivisionError
            else:
                await context.write(pb.GenerateResponse(started=pb.Started(request_id="waits")))
                await asyncio.Event().wait()
        finally:
            self.running -= 1
            self.ended += 1

    async def Explain(self, request: pb.ExplainRequest, context: Any) -> pb.ExplainResponse:
        given = dict(context.invocation_metadata())
        return pb.ExplainResponse(request_id=f"{given['a']} {given['b-bin'].hex()} {context.peer()}")


@contextlib.asynccontextmanager
async def front() -> AsyncIterator[tuple[Echo, FrontServer]]:
    echo = Echo()
    registration = Registration("tandem.v1.Inference", stubs.add_InferenceServicer_to_server, echo)
    async with (
        asyncio.timeout(DEADLINE_S),
        FrontServer("127.0.0.1:0", registration, grace_s=0, message_bytes_max=BYTES_MAX) as s,
    ):
        yield echo, s


@contextlib.asynccontextmanager
async def client() -> AsyncIterator[tuple[Echo, FrontServer, Any]]:
    async with front() as (echo, server), grpc.aio.insecure_channel(server.address) as channel:
        yield echo, server, stubs.InferenceStub(channel)


def asked(text: str, **fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(text=text, **fields)


async def test_streams_of_all_lengths_arrive_whole_and_in_order():
    async with client() as (_, _, stub):

        async def one(count: int, size: int) -> None:
            got = [m async for m in stub.Generate(asked(f"count {count}", priority=size))]
            assert [m.tokens.tokens[0].position for m in got] == list(range(count))
            assert all(m.tokens.tokens[0].text == "x" * size for m in got)

        await asyncio.gather(*(one(count, size) for count in (0, 1, 50) for size in (0, 3, 20_000)), one(3, 1_000_000))


async def test_large_requests_come_in_and_larger_ones_are_refused_by_name():
    async with client() as (_, _, stub):
        size = BYTES_MAX - 100
        (reply,) = [m async for m in stub.Generate(asked("size " + "y" * size))]
        assert reply.started.prompt_tokens == size
        with pytest.raises(grpc.aio.AioRpcError, match="larger than max") as refused:
            async for _ in stub.Generate(asked("size " + "y" * (BYTES_MAX + 1))):
                pass
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_who_does_not_read_is_waited_for_and_holds_up_nobody():
    async with client() as (echo, _, stub):
        slow = stub.Generate(asked("count 1000", priority=50_000))
        await slow.read()
        await until(lambda: echo.written > 0)
        written = -1
        while written != echo.written:  # until nothing fits any more
            written = echo.written
            for _ in range(50):
                assert len([m async for m in stub.Generate(asked("count 3"))]) == 3
        assert echo.written < 1000, "the rest waits for its reader"
        got = 1
        while await slow.read() is not grpc.aio.EOF:
            got += 1
        assert got == 1000


async def test_errors_carry_status_words_and_metadata():
    async with client() as (_, _, stub):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Generate(asked("abort")).read()
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert refused.value.details() == "100 % of “it”\n"
        assert ("why", "asked") in tuple(refused.value.trailing_metadata())
        with pytest.raises(grpc.aio.AioRpcError) as broke:
            await stub.Generate(asked("break")).read()
        assert (broke.value.code(), broke.value.details()) == (grpc.StatusCode.UNKNOWN, "Unexpected ZeroDivisionError")


async def test_a_deadline_ends_the_handler_and_so_does_hanging_up():
    async with client() as (echo, _, stub):
        late = stub.Generate(asked("wait"), timeout=0.2)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            async for _ in late:
                pass
        assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: echo.ended == 1)
        left = stub.Generate(asked("wait"))
        await left.read()
        assert echo.running == 1
        left.cancel()
        await until(lambda: echo.ended == 2)


async def test_metadata_unknown_methods_and_damaged_messages():
    async with client() as (_, server, stub):
        reply = await stub.Explain(pb.ExplainRequest(), metadata=(("a", "value"), ("b-bin", b"\x00\xff")))
        assert reply.request_id.startswith("value 00ff ipv4:127.0.0.1:")
        async with grpc.aio.insecure_channel(server.address) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as unknown:
                await channel.unary_unary("/tandem.v1.Inference/Nothing")(b"")
            assert unknown.value.code() is grpc.StatusCode.UNIMPLEMENTED
            with pytest.raises(grpc.aio.AioRpcError) as damaged:
                await channel.unary_unary("/tandem.v1.Inference/Explain")(b"\xff\xff")
            assert damaged.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert ("tandem-code", "invalid_request") in tuple(damaged.value.trailing_metadata())
            explain = channel.unary_unary("/tandem.v1.Inference/Explain")
            with pytest.raises(grpc.aio.AioRpcError) as squeezed:
                await explain(b"\x0a\x7f" + b"x" * 127, compression=grpc.Compression.Gzip)
            assert squeezed.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_health_and_reflection():
    async with front() as (_, server):

        def look() -> tuple[Any, list[str]]:
            with grpc.insecure_channel(server.address) as channel:
                health = health_pb2_grpc.HealthStub(channel)
                watched = health.Watch(health_pb2.HealthCheckRequest(service="tandem.v1.Inference"))
                first = next(watched).status
                asyncio.run_coroutine_threadsafe(server.set_serving(False), loop).result()
                return (first, next(watched).status), list(ProtoReflectionDescriptorDatabase(channel).get_services())

        loop = asyncio.get_running_loop()
        statuses, services = await asyncio.to_thread(look)
        assert statuses == (health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING)
        assert "tandem.v1.Inference" in services


async def test_leaving_finishes_what_runs_and_sends_the_rest_elsewhere():
    async with client() as (echo, server, stub):
        running = stub.Generate(asked("count 200", priority=2000))
        await running.read()
        leaving = asyncio.create_task(server.turn_away(10.0))
        await asyncio.sleep(0)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Generate(asked("count 1")).read()
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        got = 1
        while await running.read() is not grpc.aio.EOF:
            got += 1
        assert got == 200
        await leaving
        assert echo.ended == 1


async def test_what_does_not_end_in_its_grace_is_cut_off():
    async with client() as (echo, server, stub):
        endless = stub.Generate(asked("wait"))
        await endless.read()
        await server.turn_away(0.05)
        with pytest.raises(grpc.aio.AioRpcError) as cut:
            await endless.read()
        assert cut.value.code() is grpc.StatusCode.UNAVAILABLE
        assert not echo.running


# ---- clients that break the rules ----------------------------------------------------------------------------------------


def head() -> bytes:
    path = "/tandem.v1.Inference/Generate"
    usual = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ]
    return Encoder().encode(usual)


def opening(stream: int) -> bytes:
    return h2.frame(h2.HEADERS, h2.END_HEADERS, stream, head())


RULES = {
    "http/1": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "a frame too large": h2.PREFACE + struct.pack(">I", (1 << 20) << 8 | h2.DATA)[:4] + b"\0" * 5,
    "headers without end": h2.PREFACE
    + h2.frame(h2.HEADERS, 0, 1, b"\0" * 10_000)
    + b"".join(h2.frame(h2.CONTINUATION, 0, 1, b"\0" * 10_000) for _ in range(10)),
    "something between headers": h2.PREFACE + h2.frame(h2.HEADERS, 0, 1, head()) + h2.frame(h2.PING, 0, 0, bytes(8)),
    "headers that are none": h2.PREFACE + h2.frame(h2.HEADERS, h2.END_HEADERS, 1, b"\xff\xff\xff\xff\xff\xff\xff"),
    "a server's stream": h2.PREFACE + opening(2),
    "data of no stream": h2.PREFACE + h2.frame(h2.DATA, 0, 7, b"x"),
    "a window too wide": h2.PREFACE + h2.frame(h2.WINDOW_UPDATE, 0, 0, h2.word(h2.WINDOW_MAX)),
    "pings without end": h2.PREFACE + h2.frame(h2.PING, 0, 0, bytes(8)) * (RESETS_MAX + 1),
    "calls opened and broken off": h2.PREFACE
    + b"".join(opening(n) + h2.frame(h2.RST_STREAM, 0, n, h2.word(8)) for n in range(1, 2 * RESETS_MAX + 4, 2)),
    "padding without data": h2.PREFACE + opening(1) + h2.frame(h2.DATA, h2.PADDED, 1, b"\x09"),
}


@pytest.mark.parametrize("broken", RULES.values(), ids=RULES.keys())
async def test_who_breaks_the_rules_is_told_and_cut_off_while_others_are_served(broken: bytes):
    async with client() as (echo, server, stub):
        host, _, port = server.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(broken)
        said = await reader.read()  # until it is closed
        assert said.count(struct.pack(">B", h2.GOAWAY)), "with a reason"
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        assert len([m async for m in stub.Generate(asked("count 3"))]) == 3
        await until(lambda: not echo.running)


async def test_an_unread_answer_is_bounded_and_freed_with_its_connection():
    async with front() as (echo, server):
        host, _, port = server.address.rpartition(":")
        sock = socket.create_connection((host, int(port)))
        message = asked("count 100000", priority=1000).SerializeToString()
        body = h2.frame(h2.DATA, h2.END_STREAM, 1, b"\0" + len(message).to_bytes(4) + message)
        sock.sendall(h2.PREFACE + h2.frame(h2.SETTINGS, 0, 0) + opening(1) + body)
        await until(lambda: echo.written)
        written = -1
        while written != echo.written:
            written = echo.written
            await asyncio.to_thread(sock.getpeername)
            for _ in range(100):
                await asyncio.sleep(0)
        assert echo.written < 100_000
        assert echo.running == 1
        sock.close()
        await until(lambda: not echo.running)
