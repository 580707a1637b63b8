"""Attention by the native kernels: reads keys and values where they stand in their blocks, copies nothing."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from engine.attention_plan import Ints, Queries, tiles_of
from engine.native import Kernels

_TILE_ROWS = 48  # query rows of a tile: enough to make up for turning its keys, few enough to share the work among threads


class NativeAttention:
    """Same contract as `PagedAttention`. `kv` [blocks, layers, 2, kv_heads, block_size, head_dim], fp32 or bf16."""

    def __init__(
        self, kernels: Kernels, kv: Tensor, num_heads: int, windows: tuple[int | None, ...], turns: Tensor, eps: float
    ) -> None:
        _, layers, _, kv_heads, block_size, head_dim = kv.shape
        self.kernels, self.kv, self.windows, self.eps = kernels, kv, tuple(window or 0 for window in windows), eps
        self.turns = torch.view_as_real(turns).reshape(-1, head_dim).contiguous()
        self.half, self.threads = int(kv.dtype is torch.bfloat16), torch.get_num_threads()
        self.num_heads, self.kv_heads, self.head_dim, self.block_size = num_heads, kv_heads, head_dim, block_size
        self.plane = block_size * head_dim
        self.block_stride = layers * 2 * kv_heads * self.plane
        self.layers = [kv[0, layer].data_ptr() for layer in range(layers)]
        self.tile_tokens = max(1, _TILE_ROWS * kv_heads // num_heads)

    def step(self, queries: Queries, positions: Tensor, padded_tokens: int) -> NativeStep:
        total = int(queries.count.sum())
        sequence = np.repeat(np.arange(len(queries.count)), queries.count)
        position = positions.numpy()[:total]
        blocks = queries.tables[sequence, position // self.block_size]
        slots = blocks * self.block_stride + position % self.block_size * self.head_dim
        return NativeStep(
            self, slots, positions, self._tiles(queries), queries.tables, int((queries.start + queries.count).max())
        )

    def _tiles(self, queries: Queries) -> Ints:
        tiles = tiles_of(queries, self.tile_tokens)
        offset = tiles.sequence * queries.tables.shape[1]
        return np.ascontiguousarray(np.stack((tiles.first, tiles.length, tiles.start, offset), axis=1))


class NativeStep:
    """One step's attention: the model calls it once per layer."""

    def __init__(self, owner: NativeAttention, slots: Ints, positions: Tensor, tiles: Ints, tables: Ints, longest: int) -> None:
        self._owner, self._keep = owner, (slots, positions, tiles, tables)
        self._rows, self._tiles, self._longest = len(slots), len(tiles), longest
        self._slots, self._positions = slots.ctypes.data, positions.data_ptr()
        self._tile_data, self._table_data = tiles.ctypes.data, tables.ctypes.data

    def __call__(self, layer: int, heads: Tensor, qk_norm: Tensor | None) -> Tensor:
        of = self._owner
        kv, data = of.layers[layer], heads.data_ptr()
        norm = None if qk_norm is None else qk_norm.data_ptr()
        of.kernels.place(
            data, of.turns.data_ptr(), self._positions, norm, kv, of.half, self._slots, of.plane, self._rows, of.num_heads,
            of.kv_heads, of.head_dim, of.eps, of.threads,
        )  # fmt: skip
        out = torch.empty(heads.shape[0], of.num_heads * of.head_dim)
        failed = of.kernels.attend(
            data, out.data_ptr(), kv, of.half, self._tile_data, self._tiles, self._table_data, of.num_heads, of.kv_heads,
            of.head_dim, of.block_size, of.block_stride, of.windows[layer], of.head_dim**-0.5, self._longest,
            of.tile_tokens, of.threads,
        )  # fmt: skip
        if failed:
            raise MemoryError(f"no memory for the scores of {self._longest} keys")
        return out
