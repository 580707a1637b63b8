"""What a Hugging Face `config.json` says of a model, in one frozen value. No torch here.

Both spellings are read: `rope_parameters` and `dtype` (transformers 5), `rope_scaling`, `rope_theta` and `torch_dtype` (older).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from core.errors import ConfigError

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
DTYPES = ("float32", "bfloat16")
_ROPE_TYPES = ("default", "linear", "llama3")
_KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}  # where the key is left out; elsewhere num_attention_heads


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding: `default`, `linear` (positions divided by `factor`) or `llama3` (by frequency band)."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_len: int = 8192

    def inverse_frequencies(self, head_dim: int) -> list[float]:
        """Radians per position of each of the `head_dim / 2` pairs. After RoFormer; llama3 after Meta's code."""
        plain = [self.theta ** (-2.0 * i / head_dim) for i in range(head_dim // 2)]
        if self.kind == "linear":
            return [f / self.factor for f in plain]
        return [self._llama3(f) for f in plain] if self.kind == "llama3" else plain

    def _llama3(self, frequency: float) -> float:
        wavelength = 2.0 * math.pi / frequency
        if wavelength < self.original_max_len / self.high_freq_factor:
            return frequency
        if wavelength > self.original_max_len / self.low_freq_factor:
            return frequency / self.factor
        band = self.high_freq_factor - self.low_freq_factor
        smooth = (self.original_max_len / wavelength - self.low_freq_factor) / band
        return (1.0 - smooth) * frequency / self.factor + smooth * frequency


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The architecture. `windows[i]` is the sliding window of layer i in tokens, None where it sees everything."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    rope: RopeSpec
    windows: tuple[int | None, ...]
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied_head: bool
    max_model_len: int
    stored_dtype: str

    @property
    def group(self) -> int:
        """Query heads that share one key-value head."""
        return self.num_heads // self.kv_heads


def parse_spec(config: Mapping[str, Any], where: str) -> ModelSpec:
    """Reads `config.json`. Raises ConfigError that names the key of `where` to change."""
    reader = _Reader(config, where)
    family = reader.family()
    hidden, heads = reader.positive("hidden_size"), reader.positive("num_attention_heads")
    layers = reader.positive("num_hidden_layers")
    bias = bool(config.get("attention_bias", False)) if family in ("llama", "qwen3") else False
    spec = ModelSpec(
        architecture=family,
        vocab_size=reader.positive("vocab_size"),
        hidden_size=hidden,
        intermediate_size=reader.positive("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        kv_heads=reader.positive("num_key_value_heads", _KV_HEADS.get(family, heads)),
        head_dim=reader.positive("head_dim", 128 if family == "qwen3" else hidden // heads),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope=reader.rope(),
        windows=reader.windows(family, layers),
        qkv_bias=bias or family == "qwen2",
        out_bias=bias,
        mlp_bias=family == "llama" and bool(config.get("mlp_bias", False)),
        qk_norm=family == "qwen3",
        tied_head=bool(config.get("tie_word_embeddings", False)),
        max_model_len=reader.positive("max_position_embeddings", 2048),
        stored_dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch."),
    )
    if spec.num_heads % spec.kv_heads or spec.head_dim % 2:
        raise ConfigError(
            f"{where}: num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({spec.kv_heads}) "
            f"and head_dim ({spec.head_dim}) even"
        )
    return spec


@dataclass(frozen=True, slots=True)
class _Reader:
    config: Mapping[str, Any]
    where: str

    def family(self) -> str:
        names = self.config.get("architectures") or [f"model_type {self.config.get('model_type', 'unset')}"]
        family = ARCHITECTURES.get(str(names[0]))
        if family is None:
            raise ConfigError(
                f"{self.where}: architecture {names[0]} is not supported; choose a model of {', '.join(sorted(ARCHITECTURES))}"
            )
        if self.config.get("quantization_config"):
            raise ConfigError(f"{self.where}: quantised weights are not supported; use the unquantised model")
        activation = self.config.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise ConfigError(f"{self.where}: hidden_act {activation!r} is not supported, only silu")
        return family

    def positive(self, key: str, default: int | None = None) -> int:
        value = self.config.get(key)
        if value is None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{self.where}: {key} must be a positive integer, found {value!r}")
        return value

    def rope(self) -> RopeSpec:
        tree = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        if not isinstance(tree, Mapping) or any(isinstance(value, Mapping) for value in tree.values()):
            raise ConfigError(f"{self.where}: rope_parameters must be one flat group of values for all layers")
        kind = str(tree.get("rope_type") or tree.get("type") or "default")
        theta = tree.get("rope_theta") or self.config.get("rope_theta") or 1e4
        if kind not in _ROPE_TYPES:
            raise ConfigError(f"{self.where}: rope type {kind!r} is not supported, only {', '.join(_ROPE_TYPES)}")
        if kind == "default":
            return RopeSpec(float(theta))
        needed = ("factor",) if kind == "linear" else ("factor", "low_freq_factor", "high_freq_factor")
        missing = [key for key in needed if not isinstance(tree.get(key), int | float)]
        if missing:
            raise ConfigError(f"{self.where}: rope type {kind} needs {', '.join(missing)}")
        if kind == "linear":
            return RopeSpec(float(theta), kind, float(tree["factor"]))
        original = tree.get("original_max_position_embeddings") or self.config.get("max_position_embeddings") or 8192
        return RopeSpec(
            float(theta),
            kind,
            float(tree["factor"]),
            float(tree["low_freq_factor"]),
            float(tree["high_freq_factor"]),
            int(original),
        )

    def windows(self, family: str, layers: int) -> tuple[int | None, ...]:
        window = self.config.get("sliding_window", 4096)
        if family == "llama" or not window:
            return (None,) * layers
        if family == "mistral":
            return (int(window),) * layers
        if not self.config.get("use_sliding_window", False):
            return (None,) * layers
        kinds = self.config.get("layer_types")
        if kinds is None:
            first = int(self.config.get("max_window_layers", 28))
            return tuple(int(window) if layer >= first else None for layer in range(layers))
        if len(kinds) != layers:
            raise ConfigError(f"{self.where}: layer_types names {len(kinds)} layers, num_hidden_layers says {layers}")
        return tuple(int(window) if kind == "sliding_attention" else None for kind in kinds)
