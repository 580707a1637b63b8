"""HTTP/2's frames and numbers (RFC 9113 §4, §6, §7), and headers of ours in HPACK's plainest form (RFC 7541 §6.2.2). (P)"""

from __future__ import annotations

import struct
from collections.abc import Iterable

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
FRAME_MAX = 16_384
WINDOW_MAX = (1 << 31) - 1

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITY_FLAG = 0x1, 0x1, 0x4, 0x8, 0x20
NO_ERROR, PROTOCOL, INTERNAL, FLOW, _, _, FRAME_SIZE, REFUSED, CANCEL, COMPRESSION, _, CALM = range(12)

_HEAD = struct.Struct(">HBBBI")  # the length's upper sixteen bits, its lower eight, type, flags, stream
_MAX_STREAMS, _INITIAL_WINDOW, _MAX_HEADERS = 3, 4, 6


class ConnectionFailed(Exception):  # said of the connection, not of our code
    """The peer broke the protocol's rules; `code` names which."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    size = len(payload)
    return _HEAD.pack(size >> 8, size & 0xFF, kind, flags, stream) + payload


def word(number: int) -> bytes:
    return number.to_bytes(4)


def settings(streams: int, window: int, header_bytes: int) -> bytes:
    values = ((_MAX_STREAMS, streams), (_INITIAL_WINDOW, window), (_MAX_HEADERS, header_bytes))
    return frame(SETTINGS, 0, 0, b"".join(struct.pack(">HI", name, value) for name, value in values))


def unpadded(flags: int, payload: bytes) -> bytes:
    if not flags & PADDED:
        return payload
    if not payload or payload[0] >= len(payload):
        raise ConnectionFailed(PROTOCOL, "more padding than frame")
    return payload[1 : len(payload) - payload[0]]


def headers(fields: Iterable[tuple[str, str]]) -> bytes:
    """Literal, never indexed, no Huffman: nothing to remember between blocks. Values must be ASCII."""
    return b"".join(b"\x00" + _string(name) + _string(value) for name, value in fields)


def _string(text: str) -> bytes:
    raw = text.encode("ascii")
    size = len(raw)
    if size < 127:
        return bytes((size,)) + raw
    size, out = size - 127, bytearray(b"\x7f")
    while size >= 128:
        out.append(size % 128 + 128)
        size //= 128
    out.append(size)
    return bytes(out) + raw
