"""Eight bits per number, lossy: keys quantised per channel, values per token, both within one block.

After KIVI (arXiv 2402.02750): a few channels of the keys have large magnitudes in every token, so each channel of each head
gets its own scale over the block's tokens (the group of tokens is the block); values have no such channels, so each token
of each head gets its own over its channels. Asymmetric as there: zero point z = min, scale s = (max − min) / 255,
q = round((x − z) / s), x ≈ z + q · s. Scales and zero points are float32: in float16 a zero point of 100 would be off by
more than half a step of a narrow channel. They are a quarter of the encoding at 16 tokens a block, less at more.
Any |x − x'| is at most s / 2 and the rounding of the arithmetic; a constant channel comes back exact.

    zero points of k, scales of k   float32 [layers, kv_heads, head_dim] each
    zero points of v, scales of v   float32 [layers, kv_heads, block_size] each
    q                               uint8 [layers, 2, kv_heads, block_size, head_dim]

KV that is not finite, or beyond ±1e38, is not quantised: its encoding is the block itself, which is longer than any other
and so needs no mark.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from core.blocks import KvLayout
from kvtransfer.arena import Blocks
from kvtransfer.codec import INT8
from kvtransfer.encoding_error import EncodingError

Floats = npt.NDArray[np.float32]
STEPS = np.float32(255)
LARGEST = np.float32(1e38)  # bfloat16 rounds what is near its end to infinity
_K, _V = 0, 1
_TOKENS, _CHANNELS = 2, 3  # axes of [layers, kv_heads, block_size, head_dim]


class _Quantised(NamedTuple):
    zero: Floats  # along the axis it was taken over: 1
    scale: Floats
    q: npt.NDArray[np.uint8]


class Int8Codec:
    name = INT8
    lossy = True

    def __init__(self, layout: KvLayout) -> None:
        layers, _, heads, tokens, channels = layout.shape
        self._layout = layout
        self._grids = ((layers, heads, 1, channels), (layers, heads, tokens, 1))  # of k, of v
        self._sizes = tuple(int(np.prod(grid)) for grid in self._grids)
        self._small_bytes = 2 * 4 * sum(self._sizes) + int(np.prod(layout.shape))
        self.encoded_bytes_max = layout.block_bytes

    def encode(self, block: Blocks) -> Blocks:
        if self._small_bytes >= block.nbytes:
            return block.copy()
        kv = to_float32(block, self._layout)
        parts: list[Floats] = []
        q = np.empty(self._layout.shape, np.uint8)
        for half, axis in ((_K, _TOKENS), (_V, _CHANNELS)):
            zero, scale, q[:, half] = _quantise(kv[:, half], axis)
            parts += [zero.ravel(), scale.ravel()]
        small = np.concatenate(parts)
        if np.isnan(small).any():
            return block.copy()
        return np.concatenate([small.view(np.uint8), q.ravel()])

    def decode(self, data: Blocks, out: Blocks) -> None:
        if data.nbytes == out.nbytes:
            np.copyto(out, data)
            return
        if data.nbytes != self._small_bytes or out.nbytes != self._layout.block_bytes:
            raise EncodingError(f"an int8 block of {data.nbytes} bytes; its layout makes it {self._small_bytes}")
        floats = data[: 8 * sum(self._sizes)].copy().view(np.float32)
        q = data[8 * sum(self._sizes) :].reshape(self._layout.shape)
        kv = np.empty(self._layout.shape, np.float32)
        start = 0
        for half, (grid, size) in enumerate(zip(self._grids, self._sizes, strict=True)):
            zero = floats[start : start + size].reshape(grid)
            scale = floats[start + size : start + 2 * size].reshape(grid)
            start += 2 * size
            if not _sound(zero, scale):
                raise EncodingError("an int8 block whose scales are no scales")
            np.multiply(q[:, half], scale, out=kv[:, half])
            kv[:, half] += zero
        from_float32(kv, self._layout, out)


def _quantise(x: Floats, axis: int) -> _Quantised:
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is found by the caller in zero and scale
        zero = x.min(axis=axis, keepdims=True)
        scale = (x.max(axis=axis, keepdims=True) - zero) / STEPS
        if not _sound(zero, scale):
            return _Quantised(zero, np.full_like(scale, np.nan), np.zeros(x.shape, np.uint8))
        steps = x - zero
        steps /= np.where(scale > 0, scale, np.float32(1))
        np.rint(steps, out=steps)
        np.clip(steps, 0, STEPS, out=steps)  # a denormal scale is rounded so coarsely that a step more may come out
    return _Quantised(zero, scale, steps.astype(np.uint8))


def _sound(zero: Floats, scale: Floats) -> bool:
    """Whether everything that can be decoded with them is a number; False for any NaN or infinity in them."""
    with np.errstate(over="ignore", invalid="ignore"):
        return bool((scale >= 0).all() and (np.abs(zero) + STEPS * scale <= LARGEST).all())


def to_float32(block: Blocks, layout: KvLayout) -> Floats:
    """The numbers of a block as float32 [layers, 2, kv_heads, block_size, head_dim]; a view where they are float32."""
    if layout.dtype == "float32":
        return block.view(np.float32).reshape(layout.shape)
    return (block.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(layout.shape)


def from_float32(kv: Floats, layout: KvLayout, out: Blocks) -> None:
    """Writes numbers in the layout's dtype; bfloat16 is rounded to nearest, ties to even. They must be finite."""
    if layout.dtype == "float32":
        np.copyto(out.view(np.float32), kv.ravel())
        return
    bits = kv.ravel().view(np.uint32)
    np.copyto(out.view(np.uint16), ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16))
