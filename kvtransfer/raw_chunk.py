"""A ReadChunk that carries data alone, written and read by hand: protobuf would copy every byte twice more on each side.

On the wire it is what the generated code writes and reads: the tag of field 1, a varint, the bytes.
"""

from __future__ import annotations

from tandem.v1 import kv_pb2

_DATA_TAG = kv_pb2.ReadChunk.DATA_FIELD_NUMBER << 3 | 2  # 2: a length, then so many bytes


def data_head(size: int) -> bytes:
    """What stands before `size` bytes of data."""
    head = bytearray((_DATA_TAG,))
    while size > 127:
        head.append(size & 127 | 128)
        size >>= 7
    head.append(size)
    return bytes(head)


def data_of(message: bytes) -> memoryview:
    """The data of a message that may be any ReadChunk. Raises DecodeError for what is none."""
    size = len(message)
    for head_bytes in range(2, 7):  # a head's own length depends on the size it tells
        head = data_head(max(0, size - head_bytes))
        if len(head) == head_bytes and message.startswith(head):
            return memoryview(message)[head_bytes:]
    return memoryview(kv_pb2.ReadChunk.FromString(message).data)
