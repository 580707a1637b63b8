"""gRPC's calls over our own HTTP/2 connections: methods, messages, deadlines, status. What a servicer written for
`grpc.aio` needs of its context and server is here; `core.front_server` listens."""

from __future__ import annotations

import asyncio
import base64
import binascii
import inspect
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from core import http2_frames as frames
from core.errors import InvalidRequestError
from core.http2 import Connection
from core.http2_stream import Stream

log = logging.getLogger(__name__)

Metadata = tuple[tuple[str, str], ...]
_OK = frames.headers(((":status", "200"), ("content-type", "application/grpc")))
_UNITS_S = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_NOT_METADATA = frozenset({"te", "content-type", "grpc-timeout", "grpc-encoding", "grpc-accept-encoding", "grpc-message-type"})
_UNREAD_MAX = 64
"""Messages of a streamed request that wait for their handler."""


class _EndedError(Exception):
    """The call is over, with this status."""

    def __init__(self, status: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self.status = status


class Call:
    """One call: reads its request, runs its handler, and is the context that the handler gets."""

    def __init__(self, stream: Stream, handler: Any, metadata: list[tuple[str, str]], bytes_max: int) -> None:
        self._stream = stream
        self._handler = handler
        self._given = metadata
        self._bytes_max = bytes_max
        self._raw = bytearray()
        self._requests: asyncio.Queue[bytes | None] = asyncio.Queue(_UNREAD_MAX)
        self._trailing: Metadata = ()
        self._opened = False
        self._late = False
        self._alarm: asyncio.TimerHandle | None = None
        self._serialize: Callable[[Any], bytes] = handler.response_serializer
        self.task = asyncio.create_task(self._run(), name="call")

    # ---- what the connection says ----------------------------------------------------------------------------------

    def received(self, data: bytes, ended: bool) -> None:
        raw = self._raw
        raw += data
        while len(raw) >= 5 and not self._stream.closed:
            size = int.from_bytes(raw[1:5])
            if raw[0]:
                self._refuse(grpc.StatusCode.UNIMPLEMENTED, "compressed messages are not read here; send them as they are")
                return
            if size > self._bytes_max:
                text = f"Received message larger than max ({size} vs. {self._bytes_max})"
                self._refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
                return
            if len(raw) < 5 + size:
                break
            self._queue(bytes(raw[5 : 5 + size]))
            del raw[: 5 + size]
        if ended:
            self._queue(None)

    def broken_off(self) -> None:
        self.task.cancel()

    def expect_by(self, timeout_s: float) -> None:
        self._alarm = self._stream.connection.loop.call_later(timeout_s, self._on_late)

    def _on_late(self) -> None:
        self._late = True
        self.task.cancel()

    def _queue(self, message: bytes | None) -> None:
        try:
            self._requests.put_nowait(message)
        except asyncio.QueueFull:
            self._refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, "more messages than are read")

    def _refuse(self, status: grpc.StatusCode, details: str) -> None:
        self._raw.clear()
        self._end(status, details)
        self.task.cancel()

    # ---- what a handler asks its context -----------------------------------------------------------------------------

    def invocation_metadata(self) -> Metadata:
        return tuple((name, value) for name, value in self._given if name[0] != ":" and name not in _NOT_METADATA)

    def set_trailing_metadata(self, metadata: Metadata) -> None:
        self._trailing = metadata

    def peer(self) -> str:
        return self._stream.connection.peer

    async def write(self, message: Any) -> None:
        """Returns when the client's windows have room for the next one."""
        raw = self._serialize(message)
        stream = self._stream
        if not self._opened:
            self._opened = True
            stream.headers(_OK)
        stream.data(b"\x00" + len(raw).to_bytes(4) + raw)
        if stream.full:
            await stream.room()

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()) -> NoReturn:
        if trailing_metadata:
            self._trailing = trailing_metadata
        raise _EndedError(code, details)

    # ---- its course ------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        status, details = grpc.StatusCode.OK, ""
        try:
            await self._handle()
        except _EndedError as error:
            status, details = error.status, str(error)
        except asyncio.CancelledError:
            status, details = grpc.StatusCode.UNAVAILABLE, "the server is stopping"
            if self._late:
                status, details = grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded"
        except Exception as error:
            log.exception("a call failed by a mistake of ours")
            status, details = grpc.StatusCode.UNKNOWN, f"Unexpected {type(error).__name__}"
        finally:
            if self._alarm is not None:
                self._alarm.cancel()
        self._end(status, details)

    async def _handle(self) -> None:
        handler = self._handler
        kind = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        asked = self._streamed() if handler.request_streaming else await self._one()
        if inspect.isasyncgenfunction(kind):
            responses = kind(asked, self)
            try:
                async for response in responses:
                    await self.write(response)
            finally:
                await responses.aclose()
            return
        response = await kind(asked, self)
        if not handler.response_streaming:
            await self.write(response)

    async def _one(self) -> Any:
        raw = await self._requests.get()
        if raw is None:
            await self.abort(grpc.StatusCode.INTERNAL, "the request had no message")
        return await self._parsed(raw)

    async def _streamed(self) -> AsyncIterator[Any]:
        while (raw := await self._requests.get()) is not None:
            yield await self._parsed(raw)

    async def _parsed(self, raw: bytes) -> Any:
        try:
            return self._handler.request_deserializer(raw)
        except DecodeError:
            text = "the request is no valid message: text must be UTF-8, and every field of its declared type"
        self._trailing = (("tandem-code", InvalidRequestError.code),)
        raise _EndedError(grpc.StatusCode.INVALID_ARGUMENT, text)

    def _end(self, status: grpc.StatusCode, details: str) -> None:
        end(self._stream, status, details, self._trailing, self._opened)


def end(stream: Stream, status: grpc.StatusCode, details: str, metadata: Metadata = (), opened: bool = False) -> None:
    """Trailers, alone when nothing was sent before."""
    number: int = status.value[0]
    fields = [("grpc-status", str(number)), *((name, _ascii(value)) for name, value in metadata)]
    if details:
        fields.append(("grpc-message", _percent(details)))
    stream.headers((b"" if opened else _OK) + frames.headers(fields), end=True)


class Methods:
    """Every method of a server, by path, and the calls that run. `add` is what generated code calls."""

    def __init__(self, bytes_max: int) -> None:
        self.running: set[asyncio.Task[None]] = set()
        self.connections: set[Connection] = set()
        self.nobody = asyncio.Event()
        """Set while no client is connected."""
        self.nobody.set()
        self.leaving = False
        self._bytes_max = bytes_max
        self._handlers: dict[str, Any] = {}

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        """The same methods come by name below."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        self._handlers |= {f"/{service}/{name}": handler for name, handler in handlers.items()}

    def connect(self) -> Connection:
        connection = Connection(self)
        self.connections.add(connection)
        self.nobody.clear()
        if self.leaving:
            connection.leave()
        return connection

    def lost(self, connection: Connection) -> None:
        self.connections.discard(connection)
        if not self.connections:
            self.nobody.set()

    def opened(self, stream: Stream, headers: list[tuple[str, str]]) -> None:
        fields = dict(headers)
        handler = self._handlers.get(fields.get(":path", ""))
        if fields.get(":method") != "POST" or not fields.get("content-type", "").startswith("application/grpc"):
            stream.headers(frames.headers(((":status", "415"),)), end=True)
        elif handler is None:
            end(stream, grpc.StatusCode.UNIMPLEMENTED, f"Method not found: {fields.get(':path', '')}")
        else:
            try:
                timeout_s = _timeout_s(fields.get("grpc-timeout"))
                given = [(name, _value(name, value)) for name, value in headers]
            except ValueError as error:
                end(stream, grpc.StatusCode.INTERNAL, f"metadata that cannot be read: {error}")
                return
            call = Call(stream, handler, given, self._bytes_max)
            stream.reader = call
            self.running.add(call.task)
            call.task.add_done_callback(self.running.discard)
            if timeout_s is not None:
                call.expect_by(timeout_s)


def _timeout_s(text: str | None) -> float | None:
    if text is None:
        return None
    if not 2 <= len(text) <= 9 or text[-1] not in _UNITS_S or not text[:-1].isdigit():
        raise ValueError(f"grpc-timeout {text!r}")
    return int(text[:-1]) * _UNITS_S[text[-1]]


def _value(name: str, value: str) -> Any:
    if not name.endswith("-bin"):
        return value
    try:
        return base64.b64decode(value + "=" * (-len(value) % 4))
    except binascii.Error as error:
        raise ValueError(f"{name}: {error}") from None


def _ascii(value: object) -> str:
    text = str(value)
    return text if text.isascii() and text.isprintable() else _percent(text)


def _percent(text: str) -> str:
    return "".join(chr(b) if 0x20 <= b <= 0x7E and b != 0x25 else f"%{b:02X}" for b in text.encode())
