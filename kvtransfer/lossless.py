"""Lossless: the bytes of the numbers sorted into planes (all lowest bytes, …, all highest ones), each deflated if that helps.

Sign and exponent of neighbouring numbers are alike, mantissas are noise: so the planes of the mantissa stay as they are, and
the work goes where something is to be gained. Which planes shrink is tried per block on a sample.

    per plane: stored length uint32; equal to the plane's own length: as it is, smaller: a zlib stream
    then the planes, the lowest byte's first
"""

from __future__ import annotations

import struct
import zlib

import numpy as np

from core.blocks import KvLayout
from kvtransfer.arena import Blocks
from kvtransfer.codec import PLANES
from kvtransfer.encoding_error import EncodingError

LEVEL = 1
STRATEGY = zlib.Z_HUFFMAN_ONLY  # exponents repeat by frequency, not by string: several times quicker, equally small
SAMPLE_BYTES = 2048
WORTH = 0.95  # of its size, or less, or a plane is not worth the inflating


class PlanesCodec:
    name = PLANES
    lossy = False

    def __init__(self, layout: KvLayout) -> None:
        self._block_bytes = layout.block_bytes
        self._width = layout.block_bytes // (int(np.prod(layout.shape)))
        self._plane_bytes = self._block_bytes // self._width
        self._lengths = struct.Struct(f"<{self._width}I")
        self.encoded_bytes_max = self._lengths.size + self._block_bytes

    def encode(self, block: Blocks) -> Blocks:
        planes = np.ascontiguousarray(block.reshape(-1, self._width).T)
        parts = [_deflated(plane) for plane in planes]
        joined = b"".join([self._lengths.pack(*map(len, parts)), *parts])
        return np.frombuffer(joined, np.uint8)

    def decode(self, data: Blocks, out: Blocks) -> None:
        if out.nbytes != self._block_bytes:
            raise EncodingError(f"a block of {self._block_bytes} bytes for {out.nbytes}")
        if data.nbytes < self._lengths.size:
            raise EncodingError(f"an encoded block of {data.nbytes} bytes has no lengths")
        lengths = self._lengths.unpack(data[: self._lengths.size].tobytes())
        if self._lengths.size + sum(lengths) != data.nbytes or max(lengths) > self._plane_bytes:
            raise EncodingError(f"an encoded block of {data.nbytes} bytes names planes of {sum(lengths)}")
        columns, start = out.reshape(-1, self._width), self._lengths.size
        for plane, length in enumerate(lengths):
            columns[:, plane] = self._inflated(data[start : start + length])
            start += length

    def _inflated(self, part: Blocks) -> Blocks:
        if part.nbytes == self._plane_bytes:
            return part
        stream = zlib.decompressobj()
        try:
            plane = stream.decompress(part.data, self._plane_bytes + 1)  # never more, whatever the stream claims
        except zlib.error as error:
            raise EncodingError(f"an encoded block does not inflate: {error}") from None
        if len(plane) != self._plane_bytes or not stream.eof or stream.unused_data:
            raise EncodingError(f"a plane of {len(plane)} bytes where {self._plane_bytes} belong")
        return np.frombuffer(plane, np.uint8)


def _deflated(plane: Blocks) -> bytes:
    """The plane's zlib stream, or the plane as it is where that is not clearly smaller."""
    sample = plane[:: max(1, plane.nbytes // SAMPLE_BYTES)].tobytes()
    if len(_compress(sample)) <= WORTH * len(sample):
        small = _compress(plane.tobytes())
        if len(small) <= WORTH * plane.nbytes:
            return small
    return plane.tobytes()


def _compress(data: bytes) -> bytes:
    stream = zlib.compressobj(LEVEL, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, STRATEGY)
    return stream.compress(data) + stream.flush()
