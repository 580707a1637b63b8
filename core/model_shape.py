"""What a Hugging Face config.json says of a model's size: weights, KV per token, operations per token. Deciding code.

Decoder-only transformers: dense or mixture of experts, multi-head, grouped, multi-query or latent attention (MLA). Sliding
windows are taken for full attention, encoders of pictures and sound are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from core.errors import ConfigError

_UNGATED = {"opt", "bloom", "falcon", "gpt2", "gpt_neox", "gptj", "gpt_bigcode", "phi", "starcoder2", "mpt", "nemotron"}
"""Families whose feed-forward has two matrices; all others have three (SwiGLU and the like)."""
_TIED = {"opt", "bloom", "gpt2", "gpt_bigcode", "gemma", "gemma2", "gemma3_text", "falcon", "mpt"}
"""Families that tie input and output embeddings when the file does not say."""
_DTYPES = {"bfloat16": 2.0, "float16": 2.0, "float32": 4.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5}


@dataclass(frozen=True, slots=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, section 2.1): one compressed KV for all heads."""

    kv_rank: int
    q_rank: int  # 0: queries are not compressed
    rope_dim: int
    nope_dim: int
    v_dim: int


@dataclass(frozen=True, slots=True)
class Experts:
    """`count` experts of `ffn` of which each token takes `per_token`; `shared_ffn` is taken by all. The first
    `dense_layers` layers have none."""

    count: int
    per_token: int
    ffn: int
    shared_ffn: int = 0
    dense_layers: int = 0


@dataclass(frozen=True, slots=True)
class ModelShape:
    """`weight_dtype` is what matrices are stored in, `dtype` what activations and KV are."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    gated: bool
    vocab: int
    tied: bool
    dtype: str = "bfloat16"
    weight_dtype: str = "bfloat16"
    latent: Latent | None = None
    experts: Experts | None = None
    context_max: int | None = None
    """Tokens that it was made for; None where the file does not say."""

    @property
    def weight_bytes_each(self) -> float:
        return _DTYPES[self.weight_dtype]

    @property
    def value_bytes(self) -> float:
        """Of one activation or KV value."""
        return _DTYPES[self.dtype]

    @property
    def attention_params(self) -> int:
        """Of one layer's projections."""
        if self.latent is None:
            return self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        mla = self.latent
        query = self.heads * (mla.nope_dim + mla.rope_dim)
        queries = self.hidden * mla.q_rank + mla.q_rank * query if mla.q_rank else self.hidden * query
        expand = mla.kv_rank * self.heads * (mla.nope_dim + mla.v_dim)
        return queries + self.hidden * (mla.kv_rank + mla.rope_dim) + expand + self.heads * mla.v_dim * self.hidden

    def ffn_params(self, width: int) -> int:
        return (3 if self.gated else 2) * self.hidden * width

    @property
    def moe_layers(self) -> int:
        return self.layers - self.experts.dense_layers if self.experts else 0

    @property
    def params(self) -> int:
        """All weights, embeddings with them; norms and biases, under a thousandth, without."""
        total = self.vocab * self.hidden * (1 if self.tied else 2) + self.layers * self.attention_params
        total += (self.layers - self.moe_layers) * self.ffn_params(self.ffn)
        if self.experts:
            each = self.experts.count * self.ffn_params(self.experts.ffn) + self.ffn_params(self.experts.shared_ffn)
            total += self.moe_layers * (each + self.experts.count * self.hidden)
        return total

    @property
    def weights_bytes(self) -> int:
        """Embeddings stay in `dtype`, as quantised checkpoints have them."""
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        return round(embeddings * self.value_bytes + (self.params - embeddings) * self.weight_bytes_each)

    @property
    def kv_token_bytes(self) -> int:
        """KV of one token over all layers, in all tensor-parallel ranks together as long as these are at most `kv_heads`."""
        if self.latent is not None:
            return round(self.layers * (self.latent.kv_rank + self.latent.rope_dim) * self.value_bytes)
        return round(2 * self.layers * self.kv_heads * self.head_dim * self.value_bytes)

    @property
    def attention_dim(self) -> int:
        """Operations of attention per query–key pair and layer: twice this for the scores, twice for the values, on average."""
        if self.latent is None:
            return self.heads * self.head_dim
        return self.heads * (self.latent.nope_dim + self.latent.rope_dim + self.latent.v_dim) // 2


def shape_of(tree: Mapping[str, Any], where: str) -> ModelShape:
    """From the content of a config.json. Raises ConfigError that names `where` and what is missing or out of range."""
    fields = _Fields({**tree, **tree["text_config"]} if isinstance(tree.get("text_config"), Mapping) else tree, where)
    family = str(tree.get("model_type", ""))
    hidden, heads = fields.count("hidden_size", "n_embd", "d_model"), fields.count("num_attention_heads", "n_head", "n_heads")
    head_dim = fields.count("head_dim", default=max(hidden // heads, 1))
    dtype = _dtype(fields, where)
    ffn = fields.count("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", default=4 * hidden)
    return ModelShape(
        name=str(tree.get("_name_or_path") or family or where),
        hidden=hidden,
        layers=fields.count("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
        heads=heads,
        kv_heads=_kv_heads(fields, heads),
        head_dim=head_dim,
        ffn=ffn,
        gated=family not in _UNGATED,
        vocab=fields.count("vocab_size"),
        tied=bool(fields.get("tie_word_embeddings", family in _TIED)),
        dtype=dtype,
        weight_dtype=_weight_dtype(fields, dtype),
        latent=_latent(fields),
        experts=_experts(fields, ffn),
        context_max=fields.count("max_position_embeddings", "n_positions", "max_seq_len", default=0, least=0) or None,
    )


class _Fields:
    def __init__(self, tree: Mapping[str, Any], where: str) -> None:
        self._tree, self._where = tree, where

    def get(self, name: str, default: object = None) -> Any:
        value = self._tree.get(name)
        return default if value is None else value

    def count(self, *names: str, default: int | None = None, least: int = 1) -> int:
        for name in names:
            value = self._tree.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{self._where}: {name} must be a whole number of at least {least}, got {value!r}")
            return value
        if default is None:
            raise ConfigError(f"{self._where} has no {names[0]}: give the config.json of a decoder-only model")
        return default


def _kv_heads(fields: _Fields, heads: int) -> int:
    if fields.get("multi_query") and not fields.get("new_decoder_architecture"):
        return 1
    return fields.count("num_key_value_heads", "num_kv_heads", "n_head_kv", default=heads)


def _dtype(fields: _Fields, where: str) -> str:
    dtype = str(fields.get("torch_dtype", fields.get("dtype", "bfloat16"))).removeprefix("torch.")
    if dtype not in ("bfloat16", "float16", "float32"):
        raise ConfigError(f"{where}: torch_dtype {dtype!r} is not one of bfloat16, float16, float32")
    return dtype


def _weight_dtype(fields: _Fields, dtype: str) -> str:
    """Of `quantization_config`, whoever wrote it: fp8, modelopt, compressed-tensors, awq, gptq."""
    quantised = fields.get("quantization_config")
    if not isinstance(quantised, Mapping):
        return dtype
    text = str(quantised).lower()
    if "fp8" in text or "float8" in text or "'type': 'float'" in text:
        return "fp8"
    bits = quantised.get("bits", quantised.get("w_bit", quantised.get("num_bits")))
    return "int4" if bits == 4 or "w4a16" in text or "'num_bits': 4" in text else "int8"


def _latent(fields: _Fields) -> Latent | None:
    if fields.get("kv_lora_rank") is None:
        return None
    return Latent(
        kv_rank=fields.count("kv_lora_rank"),
        q_rank=fields.count("q_lora_rank", default=0),
        rope_dim=fields.count("qk_rope_head_dim"),
        nope_dim=fields.count("qk_nope_head_dim"),
        v_dim=fields.count("v_head_dim"),
    )


def _experts(fields: _Fields, ffn: int) -> Experts | None:
    count = fields.count("num_local_experts", "n_routed_experts", "num_experts", default=0, least=0)
    if count <= 1:
        return None
    width = fields.count("moe_intermediate_size", default=ffn)
    shared = fields.count("shared_expert_intermediate_size", default=0, least=0)
    return Experts(
        count=count,
        per_token=fields.count("num_experts_per_tok", "num_selected_experts", "moe_topk"),
        ffn=width,
        shared_ffn=shared or fields.count("n_shared_experts", default=0, least=0) * width,
        dense_layers=fields.count("first_k_dense_replace", default=0, least=0),
    )
