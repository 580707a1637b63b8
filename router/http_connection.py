"""One HTTP connection with bounds on what comes before the body, which uvicorn's own protocol lets grow without end."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEADER_BYTES_MAX = 64 * 1024
HEADER_TIMEOUT_S = 15.0
"""For a request line and headers to arrive, once a connection is made or a request has begun on it."""


class BoundedConnection(HttpToolsProtocol):
    """Closes a connection whose headers are too large or too slow: many of them, half open, would hold memory for ever."""

    header_timeout_s = HEADER_TIMEOUT_S

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._header_bytes: int | None = 0  # since the request began; None while its headers are complete
        self._header_alarm: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        sock = transport.get_extra_info("socket")
        if sock is not None:  # the first token of a burst must not wait for a delayed acknowledgement
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_alarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._header_bytes is not None:
            self._header_bytes += len(data)
            if self._header_bytes > HEADER_BYTES_MAX + len(data):  # what came before this piece was too much already
                self.send_400_response(f"Headers of more than {HEADER_BYTES_MAX} bytes are not read.")
                return
        super().data_received(data)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._header_alarm is None:
            self._expect_headers()

    def on_headers_complete(self) -> None:
        self._stop_alarm()
        self._header_bytes = None
        super().on_headers_complete()

    def _expect_headers(self) -> None:
        self._header_bytes = 0
        self._header_alarm = self.loop.call_later(self.header_timeout_s, self._too_late)

    def _too_late(self) -> None:
        self._header_alarm = None
        if not self.transport.is_closing():
            self.send_400_response(f"The headers did not arrive within {self.header_timeout_s:g} s.")

    def _stop_alarm(self) -> None:
        if self._header_alarm is not None:
            self._header_alarm.cancel()
            self._header_alarm = None
