"""Clients of the two fronts that do next to nothing, so that what is measured beside them is the router: bare sockets that note
when each token of a stream arrived."""

from __future__ import annotations

import asyncio
import json
import time
from abc import ABC, abstractmethod
from typing import ClassVar, Self

from tandem.v1 import inference_pb2 as pb

PROMPT = list(range(100, 132))

# Of HTTP/2 (RFC 9113) as much as a client needs that only sends requests and looks at what comes.
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, SETTINGS, PING, WINDOW_UPDATE = 0, 1, 4, 6, 8
ACK, END_STREAM, END_HEADERS = 1, 1, 4
WINDOW_MAX = (1 << 31) - 1


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3) + bytes((kind, flags)) + stream.to_bytes(4) + payload


def fields(*pairs: tuple[str, str]) -> bytes:
    """Headers as literals (RFC 7541 §6.2.2); names and values shorter than 127."""
    return b"".join(b"\0" + bytes((len(n),)) + n.encode() + bytes((len(v),)) + v.encode() for n, v in pairs)


class Door(ABC):
    """A way in, behind one or several connections."""

    name: ClassVar[str]

    @classmethod
    @abstractmethod
    async def open(cls, address: str) -> Self: ...

    @abstractmethod
    async def stream(self, request_id: str, tokens: int, arrivals: list[float]) -> None:
        """To its end. Into `arrivals` goes when each token came, on `time.perf_counter`; an empty id: the router makes one."""

    @abstractmethod
    async def whose(self) -> str:
        """The router at the other end, by the id that it gives a request."""

    @abstractmethod
    def close(self) -> None: ...


class GrpcDoor(asyncio.Protocol, Door):
    """One HTTP/2 connection with windows that never fill."""

    name = "grpc"

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._next = 1
        self._arrivals: dict[int, list[float]] = {}
        self._ends: dict[int, asyncio.Future[None]] = {}
        self._heard: dict[int, bytearray] = {}
        self._request_id = ""

    @classmethod
    async def open(cls, address: str) -> GrpcDoor:
        host, _, port = address.rpartition(":")
        _, door = await asyncio.get_running_loop().create_connection(cls, host, int(port))
        window = (4).to_bytes(2) + WINDOW_MAX.to_bytes(4)
        assert door._transport is not None
        door._transport.write(PREFACE + frame(SETTINGS, 0, 0, window))
        door._transport.write(frame(WINDOW_UPDATE, 0, 0, (WINDOW_MAX - 65_535).to_bytes(4)))
        return door

    async def stream(self, request_id: str, tokens: int, arrivals: list[float]) -> None:
        request = pb.GenerateRequest(request_id=request_id, token_ids=pb.TokenIds(ids=PROMPT))
        request.sampling.max_tokens, request.sampling.seed, request.sampling.ignore_eos = tokens, 1, True
        number, self._next = self._next, self._next + 2
        self._arrivals[number], self._heard[number] = arrivals, bytearray()
        ended = self._ends[number] = asyncio.get_running_loop().create_future()
        raw = request.SerializeToString()
        asked = ((":method", "POST"), (":scheme", "http"), (":path", "/tandem.v1.Inference/Generate"))
        head = fields(*asked, (":authority", "x"), ("content-type", "application/grpc"), ("te", "trailers"))
        assert self._transport is not None
        self._transport.write(
            frame(HEADERS, END_HEADERS, number, head) + frame(DATA, END_STREAM, number, b"\0" + len(raw).to_bytes(4) + raw)
        )
        await ended
        del self._arrivals[number]

    async def whose(self) -> str:
        await self.stream("", 1, [])
        return self._request_id.rpartition("-")[0]

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        for ended in self._ends.values():
            if not ended.done():
                ended.set_exception(ConnectionError("the router hung up"))

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        buffer, start = self._buffer, 0
        buffer += data
        while len(buffer) - start >= 9:
            end = start + 9 + int.from_bytes(buffer[start : start + 3])
            if len(buffer) < end:
                break
            kind, number = buffer[start + 3], int.from_bytes(buffer[start + 5 : start + 9])
            if kind == DATA:
                self._messages(number, buffer[start + 9 : end], now)
            elif kind == HEADERS and buffer[start + 4] & END_STREAM:
                self._ends.pop(number).set_result(None)
                del self._heard[number]
            elif kind == PING and not buffer[start + 4] & ACK and self._transport is not None:
                self._transport.write(frame(PING, ACK, 0, bytes(buffer[start + 9 : end])))
            start = end
        del buffer[:start]

    def _messages(self, number: int, data: bytearray, now: float) -> None:
        heard = self._heard[number]
        heard += data
        while len(heard) >= 5 and len(heard) >= (end := 5 + int.from_bytes(heard[1:5])):
            message = pb.GenerateResponse.FromString(bytes(heard[5:end]))
            del heard[:end]
            if count := len(message.tokens.tokens):
                self._arrivals[number] += [now] * count
            elif message.HasField("started"):
                self._request_id = message.started.request_id


class SseDoor(Door):
    """A connection per stream, as every HTTP/1.1 client has; they are kept and used again."""

    name = "sse"

    def __init__(self, address: str) -> None:
        self._host, _, self._port = address.rpartition(":")
        self._idle: list[_SseConnection] = []
        self._owner = ""

    @classmethod
    async def open(cls, address: str) -> SseDoor:
        return cls(address)

    async def stream(self, request_id: str, tokens: int, arrivals: list[float]) -> None:
        while True:
            self._idle = [each for each in self._idle if not each.transport.is_closing()]
            kept = bool(self._idle)
            connection = self._idle.pop() if kept else await self._connect()
            try:
                await connection.stream(request_id, tokens, arrivals)
                return
            except ConnectionError:
                if not kept or arrivals:
                    raise  # else the router, which closes who idles, did so just now
            finally:
                self._idle.append(connection)

    async def whose(self) -> str:
        connection = await self._dial()
        await connection.stream("", 1, [])
        self._owner = connection.owner
        self._idle.append(connection)
        return self._owner

    def close(self) -> None:
        for connection in self._idle:
            connection.transport.close()

    async def _connect(self) -> _SseConnection:
        """To the same router as the first: the kernel chooses, so it may take several."""
        while True:
            connection = await self._dial()
            if "." not in self._owner:  # there is one router
                return connection
            await connection.stream("", 1, [])
            if connection.owner == self._owner:
                return connection
            connection.transport.close()

    async def _dial(self) -> _SseConnection:
        loop = asyncio.get_running_loop()
        return (await loop.create_connection(_SseConnection, self._host, int(self._port)))[1]


class _SseConnection(asyncio.Protocol):
    def __init__(self) -> None:
        self.transport: asyncio.Transport
        self.owner = ""
        self._arrivals: list[float] = []
        self._tail = b""
        self._ended: asyncio.Future[None] | None = None

    async def stream(self, request_id: str, tokens: int, arrivals: list[float]) -> None:
        body = {"model": "nothing", "prompt": PROMPT, "max_tokens": tokens, "seed": 1, "ignore_eos": True, "stream": True}
        raw = json.dumps(body | {"return_token_ids": True} | ({"request_id": request_id} if request_id else {})).encode()
        self._arrivals, self._tail = arrivals, b""
        self._ended = asyncio.get_running_loop().create_future()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
        )
        self.transport.write(head.encode() + raw)
        await self._ended

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_exception(ConnectionError("the router hung up"))

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        data = self._tail + data
        whole, _, self._tail = data.rpartition(b"\n\n")
        for line in whole.split(b"\n"):
            if line.startswith(b"data: {"):
                self._event(json.loads(line[6:]), now)
        if data.endswith(b"0\r\n\r\n") and self._ended is not None and not self._ended.done():
            self._ended.set_result(None)

    def _event(self, event: dict[str, object], now: float) -> None:
        if "error" in event:
            raise RuntimeError(f"the router answers: {event}")
        self.owner = str(event["id"]).removeprefix("cmpl-").rpartition("-")[0]
        for choice in event["choices"]:  # type: ignore[attr-defined]
            self._arrivals += [now] * len(choice.get("token_ids", ()))
