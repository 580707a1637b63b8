"""One HTTP/2 connection as a server of gRPC sees it (RFC 9113; headers RFC 7541): frames, windows, streams. No threads.

gRPC's own server for asyncio hands each message from the event loop to a thread of its core and back: about 0.1 ms of CPU
per streamed message. Here a message is bytes in a list, and everything that one turn of the loop has to say on a
connection leaves in one write.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Protocol

from core import http2_frames as h2
from core.http2_frames import WINDOW_MAX, ConnectionFailed, frame, word
from core.http2_headers import HEADERS_MAX, Block, HeaderReader
from core.http2_stream import Stream

STREAMS_MAX = 16_384
"""Of one connection at a time."""
STREAM_WINDOW = 1 << 20
CONNECTION_WINDOW = 16 << 20
"""What a client may send before we have read it; read is everything at once, the bound on a message is the calls' affair."""
RESETS_MAX = 2_000
"""Streams that a client may open and break off within one look at it; more is an attack (CVE-2023-44487)."""
LOOK_S = 5.0
"""A client that has calls and says nothing for this long is pinged, and gone when it still says nothing after as long again."""


class Calls(Protocol):
    """What a connection tells of its streams. Called on the asyncio thread, never waits."""

    def opened(self, stream: Stream, headers: list[tuple[str, str]]) -> None: ...
    def lost(self, connection: Connection) -> None: ...


class Connection(asyncio.Protocol):
    """One per client. `calls` hears of its streams; `close` ends it once they have ended."""

    def __init__(self, calls: Calls) -> None:
        self.loop = asyncio.get_running_loop()
        self.streams: dict[int, Stream] = {}
        self.window = 65_535
        self.frame_max = 16_384
        self.paused = False
        self.peer = ""
        self._calls = calls
        self._transport: asyncio.Transport | None = None
        self._headers = HeaderReader()
        self._buffer = bytearray()
        self._greeted = False
        self._out: list[bytes] = []
        self._flush_due = False
        self._blocked: dict[int, Stream] = {}
        self._initial_window = 65_535
        self._unread = 0
        self._last_id = 0
        self._leaving = self._failed = False
        self._heard = self._pinged = False
        self._resets = self._answers = 0  # since the last look
        self._look: asyncio.TimerHandle | None = None

    # ---- the transport ---------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        sock, name = transport.get_extra_info("socket"), transport.get_extra_info("peername")
        if sock is not None:  # a token must not wait for the acknowledgement of the one before it
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if name:
            self.peer = f"ipv6:[{name[0]}]:{name[1]}" if ":" in name[0] else f"ipv4:{name[0]}:{name[1]}"
        self.put(h2.settings(STREAMS_MAX, STREAM_WINDOW, HEADERS_MAX))
        self.put(frame(h2.WINDOW_UPDATE, 0, 0, word(CONNECTION_WINDOW - 65_535)))
        self._look = self.loop.call_later(LOOK_S, self._on_look)
        if self._leaving:
            self._hang_up()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._look is not None:
            self._look.cancel()
        for stream in list(self.streams.values()):
            self._broken(stream)
        self._calls.lost(self)

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        for stream in list(self.streams.values()):
            stream.wake()

    def data_received(self, data: bytes) -> None:
        if self._failed:
            return
        self._heard = True
        self._buffer += data
        try:
            self._consume()
        except ConnectionFailed as error:
            self._fail(error)

    def _consume(self) -> None:
        buffer, start = self._buffer, 0
        if not self._greeted:
            if not h2.PREFACE.startswith(buffer[: len(h2.PREFACE)]):
                raise ConnectionFailed(h2.PROTOCOL, "this port speaks HTTP/2 for gRPC; the HTTP front has another one")
            if len(buffer) < len(h2.PREFACE):
                return
            self._greeted, start = True, len(h2.PREFACE)
        while len(buffer) - start >= 9:
            size = int.from_bytes(buffer[start : start + 3])
            if size > h2.FRAME_MAX:
                raise ConnectionFailed(h2.FRAME_SIZE, f"frames of more than {h2.FRAME_MAX} bytes are not read")
            end = start + 9 + size
            if len(buffer) < end:
                break
            number = int.from_bytes(buffer[start + 5 : start + 9]) & WINDOW_MAX
            self._on_frame(buffer[start + 3], buffer[start + 4], number, bytes(buffer[start + 9 : end]))
            start = end
        del buffer[:start]

    def put(self, data: bytes) -> None:
        """Leaves with everything else of this turn of the loop."""
        self._out.append(data)
        if not self._flush_due:
            self._flush_due = True
            self.loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        out, self._out = self._out, []
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(b"".join(out))

    # ---- frames ----------------------------------------------------------------------------------------------------

    def _on_frame(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if self._headers.unfinished:
            self._on_headers(self._headers.go_on(kind, flags, number, payload))
        elif kind == h2.DATA:
            self._on_data(flags, number, payload)
        elif kind == h2.HEADERS:
            self._on_headers(self._headers.begin(number, flags, payload))
        elif kind == h2.WINDOW_UPDATE:
            self._on_window(number, payload)
        elif kind == h2.PING:
            self._answer(flags, frame(h2.PING, h2.ACK, 0, payload[:8]))
        elif kind == h2.SETTINGS:
            if not flags & h2.ACK:
                self._on_settings(payload)
            self._answer(flags, frame(h2.SETTINGS, h2.ACK, 0))
        elif kind == h2.RST_STREAM:
            self._on_reset(number)
        elif kind in (h2.CONTINUATION, h2.PUSH_PROMISE):
            raise ConnectionFailed(h2.PROTOCOL, "a frame that clients do not send here")

    def _on_headers(self, block: Block | None) -> None:
        if block is None:
            return
        number, ended, headers = block
        stream = self.streams.get(number)
        if stream is not None:  # trailers
            self._received(stream, b"", ended=True)
            return
        if number <= self._last_id:
            return  # of a stream that we have ended
        if not number % 2:
            raise ConnectionFailed(h2.PROTOCOL, "a stream number that is not a client's")
        self._last_id = number
        if self._leaving or len(self.streams) >= STREAMS_MAX:
            self.put(frame(h2.RST_STREAM, 0, number, word(h2.REFUSED)))
            return
        stream = self.streams[number] = Stream(self, number, self._initial_window)
        self._calls.opened(stream, headers)
        if ended and not stream.closed:
            self._received(stream, b"", ended=True)

    def _on_data(self, flags: int, number: int, payload: bytes) -> None:
        size = len(payload)
        self._unread += size
        if self._unread > CONNECTION_WINDOW // 2:
            self.put(frame(h2.WINDOW_UPDATE, 0, 0, word(self._unread)))
            self._unread = 0
        stream = self.streams.get(number)
        if stream is None:
            if number > self._last_id or not number:
                raise ConnectionFailed(h2.PROTOCOL, "data of a stream that was never opened")
            return
        ended = bool(flags & h2.END_STREAM)
        stream.unread += size
        if stream.unread > STREAM_WINDOW // 2 and not ended:
            self.put(frame(h2.WINDOW_UPDATE, 0, number, word(stream.unread)))
            stream.unread = 0
        self._received(stream, h2.unpadded(flags, payload), ended)

    def _received(self, stream: Stream, data: bytes, ended: bool) -> None:
        stream.half_closed = stream.half_closed or ended
        if stream.reader is not None:
            stream.reader.received(data, ended)

    def _on_window(self, number: int, payload: bytes) -> None:
        more = int.from_bytes(payload[:4]) & WINDOW_MAX
        if not number:
            self.window += more
            if not more or self.window > WINDOW_MAX:
                raise ConnectionFailed(h2.FLOW, "a window that cannot be")
            for stream in list(self._blocked.values()):
                self.pump(stream)
        elif (stream := self.streams.get(number)) is not None:  # type: ignore[assignment]
            stream.window += more
            if not more or stream.window > WINDOW_MAX:
                self.reset(stream, h2.FLOW)
            else:
                self.pump(stream)

    def _on_settings(self, payload: bytes) -> None:
        for at in range(0, len(payload) - 5, 6):
            name, value = int.from_bytes(payload[at : at + 2]), int.from_bytes(payload[at + 2 : at + 6])
            if name == 4:
                if value > WINDOW_MAX:
                    raise ConnectionFailed(h2.FLOW, "a window that cannot be")
                change, self._initial_window = value - self._initial_window, value
                for stream in list(self.streams.values()):
                    stream.window += change
                    self.pump(stream)
            elif name == 5:
                self.frame_max = min(max(value, 16_384), 1 << 20)

    def _answer(self, flags: int, answer: bytes) -> None:
        """To a ping or settings. Who asks for thousands of answers and reads none wants our memory."""
        if flags & h2.ACK:
            return
        self._answers += 1
        if self._answers > RESETS_MAX:
            raise ConnectionFailed(h2.CALM, "too many frames that ask for an answer")
        self.put(answer)

    def _on_reset(self, number: int) -> None:
        self._resets += 1
        if self._resets > RESETS_MAX:
            raise ConnectionFailed(h2.CALM, "too many calls were broken off")
        stream = self.streams.get(number)
        if stream is not None:
            self._broken(stream)

    # ---- what is sent ----------------------------------------------------------------------------------------------

    def pump(self, stream: Stream) -> None:
        """Sends of what waits as much as the windows allow."""
        pending = stream.pending
        while pending:
            payload, ends = pending[0]
            if ends:
                self.put(frame(h2.HEADERS, h2.END_HEADERS | h2.END_STREAM, stream.id, payload))
                if not stream.half_closed:
                    self.put(frame(h2.RST_STREAM, 0, stream.id, word(h2.NO_ERROR)))
                self._ended(stream)
                return
            room = min(stream.window, self.window, self.frame_max)
            if room <= 0:
                self._blocked[stream.id] = stream
                return
            part = payload[:room]
            stream.window -= len(part)
            self.window -= len(part)
            stream.buffered -= len(part)
            self.put(frame(h2.DATA, 0, stream.id, part))
            if len(part) < len(payload):
                pending[0] = (payload[room:], False)
            else:
                pending.popleft()
        self._blocked.pop(stream.id, None)
        if not stream.full:
            stream.wake()

    def reset(self, stream: Stream, code: int) -> None:
        """Breaks a stream off from our side."""
        if not stream.closed:
            self.put(frame(h2.RST_STREAM, 0, stream.id, word(code)))
            self._broken(stream)

    def _broken(self, stream: Stream) -> None:
        self._ended(stream)
        if stream.reader is not None:
            stream.reader.broken_off()

    def _ended(self, stream: Stream) -> None:
        stream.closed = True
        stream.pending.clear()
        self.streams.pop(stream.id, None)
        self._blocked.pop(stream.id, None)
        if stream.linger is not None:
            stream.linger.cancel()
        stream.wake()
        if self._leaving and not self.streams:
            self._hang_up()

    # ---- the end ---------------------------------------------------------------------------------------------------

    def leave(self) -> None:
        """New calls go elsewhere, those under way are finished; then the connection is closed."""
        if not self._leaving:
            self._leaving = True
            self.put(frame(h2.GOAWAY, 0, 0, word(self._last_id) + word(h2.NO_ERROR)))
            if not self.streams:
                self._hang_up()

    def close(self) -> None:
        """At once, with what was said."""
        self._flush()
        self._hang_up()

    def abort(self) -> None:
        """Without a word."""
        if self._transport is not None:
            self._transport.abort()

    def _hang_up(self) -> None:
        def close() -> None:
            if self._transport is not None:
                self._transport.close()

        self.loop.call_soon(close)  # after what this turn has to say

    def _fail(self, error: ConnectionFailed) -> None:
        self.put(frame(h2.GOAWAY, 0, 0, word(self._last_id) + word(error.code) + str(error).encode()))
        self._failed = self._leaving = True
        self._buffer.clear()
        for stream in list(self.streams.values()):
            self._broken(stream)
        self._hang_up()

    def _on_look(self) -> None:
        """Every few seconds: is somebody still there?"""
        self._resets = self._answers = 0
        assert self._transport is not None
        silent = not self._heard
        if silent and (self._pinged or not self._greeted):
            self._transport.abort()
            return
        self._pinged = silent and bool(self.streams)
        if self._pinged:
            self.put(frame(h2.PING, 0, 0, bytes(8)))
        self._heard = False
        self._look = self.loop.call_later(LOOK_S, self._on_look)
