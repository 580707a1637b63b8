"""The decoder stack of Llama, Mistral, Qwen2 and Qwen3 over packed tokens: rows of many sequences side by side.

Two rearrangements of the weights save work and change no result beyond rounding: q, k and v are one product, and the rows
of q and k stand so that the two halves of a rotary pair are neighbours, which makes the rotation one complex product. The
keys in the cache stand in that order too; every worker of a fingerprint agrees on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.linear import Linear, LinearPath
from engine.native import MAX_HEAD_DIM
from engine.spec import ModelSpec


class Attend(Protocol):
    """Attention of one layer: norms and rotates, stores keys and values, answers the queries."""

    def __call__(self, layer: int, heads: Tensor, qk_norm: Tensor | None) -> Tensor:
        """`heads` [rows, (num_heads + 2 · kv_heads) · head_dim] as projected, which it may overwrite; `qk_norm`
        [num_heads + kv_heads, head_dim] in fp32. Returns [rows, num_heads · head_dim].
        """
        ...


@dataclass(frozen=True, slots=True)
class Layer:
    input_norm: Tensor
    qkv: Linear
    qk_norm: Tensor | None  # [num_heads + kv_heads, head_dim]
    out: Linear
    post_norm: Tensor
    gate: Linear
    up: Linear
    down: Linear


class DecoderModel:
    """Weights in their compute form. Not thread-safe: one thread runs it, under `torch.inference_mode`."""

    def __init__(
        self, spec: ModelSpec, dtype: torch.dtype, weights: Mapping[str, Tensor], path: LinearPath, max_len: int
    ) -> None:
        self.spec, self.path = spec, path
        self.native_attention = path.kernels is not None and spec.head_dim <= MAX_HEAD_DIM
        self.rotations = rotations(spec, max_len)
        self._embed = weights["model.embed_tokens.weight"].to(dtype)
        self._layers = tuple(_layer(spec, dtype, weights, path, layer) for layer in range(spec.num_layers))
        self._final_norm = weights["model.norm.weight"].to(dtype).to(path.dtype)
        head = self._embed if spec.tied_head else weights["lm_head.weight"].to(dtype)
        self._head = path.make(head, None)

    def forward(self, token_ids: Tensor, attend: Attend) -> Tensor:
        """Hidden states [rows, hidden] after the last layer; `token_ids` is [rows], rows as the path pads."""
        x = F.embedding(token_ids, self._embed).to(self.path.dtype)
        for index, layer in enumerate(self._layers):
            heads = layer.qkv(self._norm(x, layer.input_norm))
            x = layer.out.add(attend(index, heads, layer.qk_norm), x)
            normed = self._norm(x, layer.post_norm)
            x = layer.down.add(layer.up.mul(normed, layer.gate.silu(normed)), x)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores [rows, vocab] in fp32 of hidden states [rows, hidden], rows as the path pads."""
        return self._head(self._norm(hidden, self._final_norm)).float()

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.path.kernels is not None:
            return self.path.kernels.norm(x, weight, self.spec.norm_eps)
        return F.rms_norm(x, (self.spec.hidden_size,), weight, self.spec.norm_eps)


def product_shapes(spec: ModelSpec) -> list[tuple[int, int]]:
    """(out, in) of every matrix product of the model."""
    q_rows, kv_rows = spec.num_heads * spec.head_dim, spec.kv_heads * spec.head_dim
    hidden, inter = spec.hidden_size, spec.intermediate_size
    return [(q_rows + 2 * kv_rows, hidden), (hidden, q_rows), (inter, hidden), (hidden, inter), (spec.vocab_size, hidden)]


def rotations(spec: ModelSpec, max_len: int) -> Tensor:
    """e^(i · position · frequency) as complex64 [max_len, head_dim / 2]; angles in fp32, as the models were trained."""
    frequencies = torch.tensor(spec.rope.inverse_frequencies(spec.head_dim), dtype=torch.float32)
    angles = torch.outer(torch.arange(max_len, dtype=torch.float32), frequencies)
    return torch.polar(torch.ones_like(angles), angles)


def _layer(spec: ModelSpec, dtype: torch.dtype, weights: Mapping[str, Tensor], path: LinearPath, layer: int) -> Layer:
    at = f"model.layers.{layer}."

    def linear(name: str) -> Linear:
        bias = weights.get(f"{at}{name}.bias")
        return path.make(weights[f"{at}{name}.weight"].to(dtype), None if bias is None else bias.to(dtype))

    def fused(kind: str) -> Tensor:
        q, k, v = (weights[f"{at}self_attn.{name}_proj.{kind}"].to(dtype) for name in "qkv")
        return torch.cat((_paired(q, spec.num_heads), _paired(k, spec.kv_heads), v))

    norm = None
    if spec.qk_norm:
        q_norm, k_norm = (_paired(weights[f"{at}self_attn.{name}_norm.weight"].to(dtype).float(), 1) for name in "qk")
        norm = torch.cat((q_norm.expand(spec.num_heads, -1), k_norm.expand(spec.kv_heads, -1))).contiguous()
    return Layer(
        input_norm=weights[at + "input_layernorm.weight"].to(dtype).to(path.dtype),
        qkv=path.make(fused("weight"), fused("bias") if spec.qkv_bias else None),
        qk_norm=norm,
        out=linear("self_attn.o_proj"),
        post_norm=weights[at + "post_attention_layernorm.weight"].to(dtype).to(path.dtype),
        gate=linear("mlp.gate_proj"),
        up=linear("mlp.up_proj"),
        down=linear("mlp.down_proj"),
    )


def _paired(rows: Tensor, heads: int) -> Tensor:
    """Reorders each head's rows from halves (i, i + d/2) to neighbours (2i, 2i + 1)."""
    split = rows.view(heads, 2, -1, *rows.shape[1:])
    return split.transpose(1, 2).reshape(rows.shape)
