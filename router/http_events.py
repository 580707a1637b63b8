"""Server-sent events on their way to a client that may be slow, or gone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from starlette.types import Send

from router import explain
from router.http_errors import body_of, response_of
from router.sse import event

WRITE_TIMEOUT_S = 60.0
"""A client that takes nothing for this long has its connection closed; its request is cancelled sooner (slow_client_s)."""


class SlowClientError(Exception):
    """Nothing more can be written."""


class EventWriter:
    """A stream of server-sent events on one response. Each call is one write, flushed at once.

    A context manager for the task that writes: one timer for all writes is cheaper than one for each.
    """

    def __init__(self, send: Send, request_id: str, why: Callable[[], str | None]) -> None:
        """`why`: the value of the explaining header, where it is wanted."""
        self._send = send
        self._request_id = request_id
        self._why = why
        self._opened = False
        self._task: asyncio.Task[Any] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._writing_since: float | None = None
        self._late = False

    def __enter__(self) -> Self:
        self._task = asyncio.current_task()
        self._watch()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._timer is not None:
            self._timer.cancel()

    async def open(self) -> None:
        if self._opened:
            return
        self._opened = True
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),  # a proxy must not collect tokens
            (b"x-request-id", self._request_id.encode()),
        ]
        if (why := self._why()) is not None:
            headers.append((explain.HEADER.encode(), why.encode()))
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def send(self, lines: bytes) -> None:
        if lines:
            await self._write(lines, more=True)

    async def close(self, last: bytes) -> None:
        await self._write(last, more=False)

    async def fail(self, error: Exception) -> None:
        """As a plain response while that is possible; afterwards as an event, and without the `[DONE]` of a whole answer."""
        if self._opened:
            await self.close(event(body_of(error)))
        else:
            response = response_of(error, self._request_id, self._why())
            start = {"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers}
            await self._send(start)
            await self._write(bytes(response.body), more=False)

    async def _write(self, body: bytes, *, more: bool) -> None:
        """Raises SlowClientError when it takes too long."""
        self._writing_since = asyncio.get_running_loop().time()
        try:
            await self._send({"type": "http.response.body", "body": body, "more_body": more})
        except asyncio.CancelledError:
            if self._late and self._task is not None and self._task.uncancel() == 0:
                raise SlowClientError from None
            raise
        self._writing_since = None

    def _watch(self) -> None:
        """Rings once per `WRITE_TIMEOUT_S`, sooner only while a write waits."""
        loop, since = asyncio.get_running_loop(), self._writing_since
        left_s = WRITE_TIMEOUT_S if since is None else since + WRITE_TIMEOUT_S - loop.time()
        if left_s > 0:
            self._timer = loop.call_later(left_s, self._watch)
        elif self._task is not None:
            self._late = True
            self._task.cancel()
