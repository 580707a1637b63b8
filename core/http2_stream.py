"""One stream of an HTTP/2 connection: what its client may still be sent, and what waits for that."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Protocol

from core import http2_frames as h2
from core.http2_frames import frame

BUFFERED_MAX = 64 * 1024
"""Of one stream: whoever writes more waits until the client has read."""
LINGER_S = 60.0
"""For a client to take the rest of an answer that has ended."""


class Carrier(Protocol):
    """What a stream needs of its connection."""

    loop: asyncio.AbstractEventLoop
    window: int
    frame_max: int
    paused: bool
    peer: str

    def put(self, data: bytes) -> None: ...
    def pump(self, stream: Stream) -> None: ...
    def reset(self, stream: Stream, code: int) -> None: ...


class Reader(Protocol):
    """Of one stream's request."""

    def received(self, data: bytes, ended: bool) -> None: ...

    def broken_off(self) -> None:
        """By the client, or with its connection; nothing can be sent any more."""
        ...


class Stream:
    __slots__ = (
        "blocked", "buffered", "closed", "connection", "half_closed", "id", "linger", "pending", "reader", "unread", "waiter",
        "window",
    )  # fmt: skip

    def __init__(self, connection: Carrier, number: int, window: int) -> None:
        self.connection = connection
        self.id = number
        self.window = window  # what may be sent
        self.unread = 0  # of our window for it, used up
        self.pending: deque[tuple[bytes, bool]] = deque()  # data, or the trailers that end the stream
        self.buffered = 0
        self.blocked = False
        self.half_closed = False
        self.closed = False
        self.reader: Reader | None = None
        self.waiter: asyncio.Future[None] | None = None
        self.linger: asyncio.TimerHandle | None = None

    def headers(self, block: bytes, *, end: bool = False) -> None:
        """Response headers at once; with `end`, trailers behind whatever still waits for the client."""
        if self.closed:
            return
        if not end:
            self.connection.put(frame(h2.HEADERS, h2.END_HEADERS, self.id, block))
            return
        self.pending.append((block, True))
        self.connection.pump(self)
        if not self.closed:
            self.linger = self.connection.loop.call_later(LINGER_S, self.connection.reset, self, h2.NO_ERROR)

    def data(self, payload: bytes) -> None:
        """Sends what the client's windows have room for, keeps the rest: `await room()` before the next."""
        connection, size = self.connection, len(payload)
        if self.closed:
            return
        if not self.pending and size <= self.window and size <= connection.window and size <= connection.frame_max:
            self.window -= size
            connection.window -= size
            connection.put(frame(h2.DATA, 0, self.id, payload))
            return
        self.pending.append((payload, False))
        self.buffered += size
        connection.pump(self)

    @property
    def full(self) -> bool:
        return not self.closed and (self.buffered > BUFFERED_MAX or self.connection.paused)

    async def room(self) -> None:
        """Returns when more may be written; at once after the stream has ended."""
        while self.full:
            self.waiter = self.connection.loop.create_future()
            await self.waiter

    def wake(self) -> None:
        waiter, self.waiter = self.waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
