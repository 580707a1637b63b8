"""Header blocks as they arrive, in one frame or several (RFC 9113 §4.3), decoded (RFC 7541) within bounds."""

from __future__ import annotations

from typing import NamedTuple

from hpack import Decoder, HPACKError, OversizedHeaderListError

from core import http2_frames as h2
from core.http2_frames import ConnectionFailed

HEADERS_MAX = 64 * 1024


class Block(NamedTuple):
    stream: int
    ended: bool
    """Nothing follows on this stream."""
    fields: list[tuple[str, str]]


class HeaderReader:
    """One per connection: blocks share a table. Raises ConnectionFailed, after which nothing more can be read."""

    def __init__(self) -> None:
        self._decoder = Decoder(max_header_list_size=HEADERS_MAX)
        self._stream: int | None = None
        self._ended = False
        self._raw = bytearray()

    @property
    def unfinished(self) -> bool:
        """Only the rest of these headers may come now."""
        return self._stream is not None

    def begin(self, stream: int, flags: int, payload: bytes) -> Block | None:
        self._stream, self._ended = stream, bool(flags & h2.END_STREAM)
        payload = h2.unpadded(flags, payload)
        return self._add(flags, payload[5:] if flags & h2.PRIORITY_FLAG else payload)

    def go_on(self, kind: int, flags: int, stream: int, payload: bytes) -> Block | None:
        if kind != h2.CONTINUATION or stream != self._stream:
            raise ConnectionFailed(h2.PROTOCOL, "headers were not finished")
        return self._add(flags, payload)

    def _add(self, flags: int, payload: bytes) -> Block | None:
        assert self._stream is not None
        self._raw += payload
        if len(self._raw) > HEADERS_MAX:
            raise ConnectionFailed(h2.CALM, f"headers of more than {HEADERS_MAX} bytes are not read")
        if not flags & h2.END_HEADERS:
            return None
        raw, stream = bytes(self._raw), self._stream
        self._raw.clear()
        self._stream = None
        try:
            fields = [(str(name), str(value)) for name, value in self._decoder.decode(raw)]
        except OversizedHeaderListError:
            raise ConnectionFailed(h2.CALM, f"headers of more than {HEADERS_MAX} bytes are not read") from None
        except (HPACKError, UnicodeDecodeError):
            raise ConnectionFailed(h2.COMPRESSION, "headers that cannot be read") from None
        return Block(stream, self._ended, fields)
