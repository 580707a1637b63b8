"""Connections that never finish their headers are closed, and cost no more than the bound."""

import asyncio
import socket
import time

import pytest
import uvloop

from router.http_connection import HEADER_BYTES_MAX, BoundedConnection
from router.web import web_server

REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n"


async def app(scope, receive, send):
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
async def connect(monkeypatch):
    monkeypatch.setattr(BoundedConnection, "header_timeout_s", 0.3)
    async with web_server(app, "127.0.0.1:0", 1.0) as address:
        host, _, port = address.rpartition(":")
        writers = []

        async def opened():
            reader, writer = await asyncio.open_connection(host, int(port))
            writers.append(writer)
            return reader, writer

        yield opened
        for writer in writers:
            writer.close()


async def _send_headers(reader, writer, size):
    """Returns how much went out before the connection ended, at most `size`."""
    sent = 0
    try:
        while sent < size:
            writer.write(b"a" * 16_384)
            await writer.drain()
            sent += 16_384
        await reader.read()
    except ConnectionError:
        pass
    return sent


async def test_headers_without_end_are_refused(connect):
    reader, writer = await connect()
    writer.write(REQUEST + b"X: ")
    async with asyncio.timeout(10):
        sent = await _send_headers(reader, writer, 512 * HEADER_BYTES_MAX)
    assert sent < 512 * HEADER_BYTES_MAX, "all of it was read"


@pytest.mark.parametrize("half", [b"", b"GET /", REQUEST])
async def test_half_open_connections_end(connect, half):
    reader, writer = await connect()
    began = time.monotonic()
    writer.write(half)
    async with asyncio.timeout(5):
        assert (await reader.read()).startswith(b"HTTP/1.1 400")
    assert time.monotonic() - began >= 0.25


async def test_a_request_that_stalls_after_a_good_one_ends(connect):
    reader, writer = await connect()
    writer.write(REQUEST + b"\r\n")
    assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
    writer.write(b"GET / HT")
    async with asyncio.timeout(5):
        assert b"400" in await reader.read()


async def test_a_slow_body_and_large_but_bounded_headers_pass(connect):
    reader, writer = await connect()
    writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nX: " + b"a" * (HEADER_BYTES_MAX - 200) + b"\r\n\r\na")
    with pytest.raises(TimeoutError):  # longer than headers may take
        async with asyncio.timeout(0.6):
            await reader.read(1)
    writer.write(b"b")
    async with asyncio.timeout(5):
        assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_no_token_waits_for_an_acknowledgement(loop_factory, monkeypatch):
    """Whatever the loop does of itself: Nagle's algorithm is off, where it was on before the connection was ours."""
    seen = []
    made, plain = BoundedConnection.connection_made, BoundedConnection.__mro__[1].connection_made

    def nagle_first(self, transport):
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 0)
        plain(self, transport)

    def looked_at(self, transport):
        made(self, transport)
        seen.append(transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    monkeypatch.setattr(BoundedConnection.__mro__[1], "connection_made", nagle_first)
    monkeypatch.setattr(BoundedConnection, "connection_made", looked_at)

    async def ask():
        async with web_server(app, "127.0.0.1:0", 1.0) as address:
            host, _, port = address.rpartition(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(REQUEST + b"Connection: close\r\n\r\n")
            async with asyncio.timeout(10):
                assert (await reader.read()).endswith(b"ok")
            writer.close()
            await writer.wait_closed()

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(ask())
    assert seen == [1]
