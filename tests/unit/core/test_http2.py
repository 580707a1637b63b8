"""Frames, headers and windows of our HTTP/2, without a socket: whatever arrives, in whatever pieces."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest
from hpack import Decoder, Encoder
from hypothesis import given
from hypothesis import strategies as st

from core import http2_frames as h2
from core.http2 import Connection
from core.http2_headers import HeaderReader
from core.http2_stream import Stream


class Wire(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = b""
        self.closed = False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def write(self, data: Any) -> None:
        self.sent += data

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    abort = close


class Calls:
    def __init__(self) -> None:
        self.streams: list[Stream] = []

    def opened(self, stream: Stream, headers: list[tuple[str, str]]) -> None:
        self.streams.append(stream)

    def lost(self, connection: Connection) -> None:
        pass


def frames(raw: bytes) -> list[tuple[int, int, int, bytes]]:
    found = []
    while raw:
        size = int.from_bytes(raw[:3])
        found.append((raw[3], raw[4], int.from_bytes(raw[5:9]), raw[9 : 9 + size]))
        raw = raw[9 + size :]
    return found


async def connected() -> tuple[Connection, Wire, Calls]:
    calls, wire = Calls(), Wire()
    connection = Connection(calls)
    connection.connection_made(wire)
    connection.data_received(h2.PREFACE)
    return connection, wire, calls


@given(st.lists(st.tuples(st.from_regex(r"[a-z-]{1,9}", fullmatch=True), st.text("abc %~", max_size=300)), max_size=9))
def test_headers_of_ours_are_read_by_others(fields):
    assert [(str(n), str(v)) for n, v in Decoder().decode(h2.headers(fields))] == fields


@given(st.binary(max_size=40), st.integers(0, 255))
def test_padding_comes_off_or_is_refused(payload, padding):
    framed = bytes((padding,)) + payload + bytes(padding)
    assert h2.unpadded(h2.PADDED, framed) == payload
    assert h2.unpadded(0, payload) == payload
    if payload and payload[0] >= len(payload):
        with pytest.raises(h2.ConnectionFailed):
            h2.unpadded(h2.PADDED, payload)


def test_headers_in_several_frames_keep_the_table():
    reader, encoder = HeaderReader(), Encoder()
    for number in (1, 3, 5):
        raw = encoder.encode([("a", "b"), ("c", str(number))])
        assert reader.begin(number, h2.END_STREAM, raw[:1]) is None
        assert reader.unfinished
        block = reader.go_on(h2.CONTINUATION, h2.END_HEADERS, number, raw[1:])
        assert block == (number, True, [("a", "b"), ("c", str(number))])


def cut(raw: bytes, at: list[int]) -> list[bytes]:
    """The same bytes in pieces."""
    places = sorted({0, len(raw), *(place % (len(raw) + 1) for place in at)})
    return [raw[a:b] for a, b in itertools.pairwise(places)]


@given(st.binary(max_size=300), st.lists(st.integers(0, 400), max_size=6))
def test_nothing_that_arrives_can_raise(noise, at):
    async def story() -> None:
        connection, wire, _ = await connected()
        opening = h2.frame(h2.HEADERS, h2.END_HEADERS, 1, Encoder().encode([(":path", "/x")]))
        for piece in cut(opening + noise, at):
            connection.data_received(piece)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert frames(wire.sent)[0][0] == h2.SETTINGS
        connection.connection_lost(None)

    asyncio.run(story())


_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("data"), st.integers(0, 1), st.integers(1, 90_000)),
        st.tuples(st.just("stream"), st.integers(0, 1), st.integers(1, 70_000)),
        st.tuples(st.just("connection"), st.just(0), st.integers(1, 70_000)),
        st.tuples(st.just("initial"), st.just(0), st.integers(0, 100_000)),
    ),
    max_size=30,
)


@given(_STEPS)
def test_what_is_sent_never_exceeds_a_window_and_nothing_is_lost(steps):
    async def story() -> None:
        connection, wire, calls = await connected()
        for number in (1, 3):
            connection.data_received(h2.frame(h2.HEADERS, h2.END_HEADERS, number, Encoder().encode([(":path", "/x")])))
        granted, shared, initial = [65_535, 65_535], 65_535, 65_535
        given_over = [0, 0]
        for kind, which, size in steps:
            if kind == "data":
                calls.streams[which].data(bytes(size))
                given_over[which] += size
            elif kind == "stream":
                connection.data_received(h2.frame(h2.WINDOW_UPDATE, 0, 2 * which + 1, h2.word(size)))
                granted[which] += size
            elif kind == "connection":
                connection.data_received(h2.frame(h2.WINDOW_UPDATE, 0, 0, h2.word(size)))
                shared += size
            else:
                connection.data_received(h2.frame(h2.SETTINGS, 0, 0, (4).to_bytes(2) + size.to_bytes(4)))
                granted, initial = [one + size - initial for one in granted], size
            connection._flush()
            sent = [0, 0]
            for frame_kind, _, stream, payload in frames(wire.sent):
                if frame_kind == h2.DATA:
                    assert len(payload) <= connection.frame_max
                    sent[stream // 2] += len(payload)
            assert sum(sent) <= shared
            for number in (0, 1):
                waiting = sum(len(payload) for payload, _ in calls.streams[number].pending)
                assert sent[number] + waiting == given_over[number]
                assert calls.streams[number].buffered == waiting
                if waiting:
                    assert calls.streams[number].window <= 0 or connection.window <= 0
                assert calls.streams[number].window == granted[number] - sent[number]
        connection.connection_lost(None)

    asyncio.run(story())


async def test_an_answer_ends_behind_its_data_and_leaves_nothing():
    connection, wire, calls = await connected()
    connection.data_received(h2.frame(h2.HEADERS, h2.END_HEADERS, 1, Encoder().encode([(":path", "/x")])))
    stream = calls.streams[0]
    stream.headers(h2.headers([(":status", "200")]))
    stream.data(bytes(100_000))
    stream.headers(h2.headers([("grpc-status", "0")]), end=True)
    assert connection.streams
    connection.data_received(h2.frame(h2.WINDOW_UPDATE, 0, 0, h2.word(100_000)))
    connection.data_received(h2.frame(h2.WINDOW_UPDATE, 0, 1, h2.word(100_000)))
    connection._flush()
    kinds = [kind for kind, _, number, _ in frames(wire.sent) if number == 1]
    assert kinds[0] == h2.HEADERS
    assert kinds[-2:] == [h2.HEADERS, h2.RST_STREAM]
    assert set(kinds[1:-2]) == {h2.DATA}
    assert not connection.streams
    connection.connection_lost(None)
