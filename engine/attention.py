"""Attention over the paged cache as plain matrix products, batch-invariant by construction (see `attention_plan`)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.attention_plan import Group, Ints, Limits, Merge, Plan, Queries, Shape, plan_attention


class _GroupTensors(NamedTuple):
    group: Group
    query_rows: Tensor
    key_rows: Tensor
    bias: Tensor


class _MergeTensors(NamedTuple):
    chunks: int
    rows: Tensor  # [lanes, N]
    by_lane: Tensor  # [N * lanes]
    absent: Tensor


class PagedAttention:
    """Writes a step's keys and values into `kv` [blocks, layers, 2, kv_heads, block_size, head_dim] and attends over them.

    `kv` must hold finite numbers throughout (fresh shared memory is zero): masked keys are multiplied by zero.
    """

    def __init__(
        self, kv: Tensor, num_heads: int, windows: tuple[int | None, ...], turns: Tensor, eps: float, limits: Limits
    ) -> None:
        _, layers, _, kv_heads, block_size, head_dim = kv.shape
        self._shape = Shape(num_heads, kv_heads, head_dim, layers, block_size)
        self._limits, self._windows, self._turns, self._eps = limits, windows, turns, eps
        flat, plane = kv.view(-1), kv_heads * block_size * head_dim * 2
        # one view per layer that starts at its first plane: the same row numbers serve all layers
        self._pages = [flat[layer * plane :].view(-1, block_size * head_dim) for layer in range(layers)]
        self._slots = [flat[layer * plane :].view(-1, head_dim) for layer in range(layers)]
        self._scale, self.head_dim = head_dim**-0.5, head_dim
        self._dtype = kv.dtype

    def step(self, queries: Queries, positions: Tensor, padded_tokens: int) -> AttentionStep:
        """`positions` [padded_tokens] of the packed tokens in their sequences."""
        plans = {
            window: _StepPlan(plan_attention(queries, padded_tokens, window, self._shape, self._limits))
            for window in dict.fromkeys(self._windows)
        }
        slots = torch.from_numpy(self._slot_rows(queries, positions.numpy()))
        turns = self._turns.index_select(0, positions).unsqueeze(1)
        return AttentionStep(self, slots, turns, [plans[window] for window in self._windows])

    def rotate(self, heads: Tensor, turns: Tensor, qk_norm: Tensor | None) -> Tensor:
        """Norms and rotates queries and keys of `heads` [rows, all heads, head_dim] fp32 in place."""
        rotated = self._shape.num_heads + self._shape.kv_heads
        if qk_norm is not None:
            part = heads[:, :rotated]
            part.copy_(F.rms_norm(part, (self._shape.head_dim,), None, self._eps).mul_(qk_norm))
        pairs = heads.view(heads.shape[0], -1, self._shape.head_dim // 2, 2)
        torch.view_as_complex(pairs)[:, :rotated].mul_(turns)
        return heads

    def write(self, layer: int, slots: Tensor, heads: Tensor) -> None:
        shape = self._shape
        tokens = slots.shape[0] // (2 * shape.kv_heads)
        fresh = heads[:tokens, shape.num_heads :].reshape(-1, shape.head_dim)
        self._slots[layer].index_copy_(0, slots, fresh.to(self._dtype))

    def attend(self, layer: int, plan: _StepPlan, heads: Tensor) -> Tensor:
        shape = self._shape
        rows, pages = heads.view(-1, shape.head_dim), self._pages[layer]
        merge = plan.merge
        results = [self._product(group, rows, pages, merge is not None) for group in plan.groups]
        joined = results[0][0] if len(results) == 1 else torch.cat([result[0] for result in results])
        if merge is not None:
            joined = _merged(merge, joined, [result[1] for result in results])
        elif plan.out_rows is not None:
            joined = joined.index_select(0, plan.out_rows)
        return joined.view(heads.shape[0], shape.num_heads * shape.head_dim)

    def _slot_rows(self, queries: Queries, positions: Ints) -> Ints:
        """Where each token's keys and values go: rows of kv seen as [blocks * layers * 2 * kv_heads * block_size, head_dim]."""
        shape = self._shape
        sequence = np.repeat(np.arange(len(queries.count)), queries.count)
        position = positions[: len(sequence)]
        block = queries.tables[sequence, position // shape.block_size]
        first = block * (shape.num_layers * 2 * shape.kv_heads * shape.block_size) + position % shape.block_size
        rows: Ints = first[:, None] + np.arange(2 * shape.kv_heads) * shape.block_size
        return rows.reshape(-1)

    def _product(self, tensors: _GroupTensors, rows: Tensor, pages: Tensor, with_weight: bool) -> tuple[Tensor, Tensor]:
        """Output rows [items * kv_heads * rows, head_dim], and for a merge each row's (largest score, largest probability)."""
        group, shape = tensors.group, self._shape
        batch = group.items * shape.kv_heads
        query = rows.index_select(0, tensors.query_rows).mul_(self._scale).view(batch, group.rows, shape.head_dim)
        gathered = pages.index_select(0, tensors.key_rows).float()
        keys, values = gathered.view(2, batch, group.width, shape.head_dim)
        scores = torch.bmm(query, keys.transpose(1, 2))
        per_query = group.rows // group.tile
        scores.view(group.items, shape.kv_heads, group.tile, per_query, group.width).add_(tensors.bias)
        shares = torch.softmax(scores, -1)
        out = torch.bmm(shares, values).view(-1, shape.head_dim)
        if not with_weight:
            return out, out
        return out, torch.stack((scores.amax(-1).view(-1), shares.amax(-1).view(-1)))


class AttentionStep:
    """One step's attention: the model calls it once per layer."""

    def __init__(self, attention: PagedAttention, slots: Tensor, turns: Tensor, plans: list[_StepPlan]) -> None:
        self._attention, self._slots, self._turns, self._plans = attention, slots, turns, plans

    def __call__(self, layer: int, heads: Tensor, qk_norm: Tensor | None) -> Tensor:
        split = heads.view(heads.shape[0], -1, self._attention.head_dim).float()
        rotated = self._attention.rotate(split, self._turns, qk_norm)
        self._attention.write(layer, self._slots, rotated)
        return self._attention.attend(layer, self._plans[layer], rotated).to(heads.dtype)


class _StepPlan:
    """A plan's arrays as tensors (they share memory)."""

    def __init__(self, plan: Plan) -> None:
        self.groups = [
            _GroupTensors(g, torch.from_numpy(g.query_rows), torch.from_numpy(g.key_rows), torch.from_numpy(g.bias))
            for g in plan.groups
        ]
        self.out_rows = None if plan.out_rows is None else torch.from_numpy(plan.out_rows)
        self.merge = None if plan.merge is None else _merge_tensors(plan.merge)


def _merge_tensors(merge: Merge) -> _MergeTensors:
    rows = torch.from_numpy(merge.rows)
    return _MergeTensors(merge.chunks, rows, rows.t().reshape(-1), torch.from_numpy(merge.absent))


def _merged(merge: _MergeTensors, joined: Tensor, weights: list[Tensor]) -> Tensor:
    """Σ wᶜ·outᶜ with wᶜ ∝ exp(maxᶜ)·sumᶜ and sumᶜ = 1 / largest probability; a single chunk gets exactly 1.

    Chunks are added one after the other and every lane-wise sum has `MERGE_LANES` terms, so the order is always the same.
    """
    lanes = merge.absent.shape[1]
    top, share = torch.cat(weights, 1).index_select(1, merge.by_lane).view(2, -1, lanes)
    weight = torch.softmax(top + merge.absent, -1).div_(share)
    total = weight[:, 0].clone()
    for chunk in range(1, merge.chunks):
        total += weight[:, chunk]
    weight.div_(total.unsqueeze(1))
    out = joined.index_select(0, merge.rows[0]).mul_(weight[:, :1])
    for chunk in range(1, merge.chunks):
        out += joined.index_select(0, merge.rows[chunk]).mul_(weight[:, chunk : chunk + 1])
    return out
