"""Tiny random checkpoints of every architecture, saved by transformers, and executors over them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

BLOCK_SIZE = 4
NUM_BLOCKS = 256
SMALL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.4,  # wide enough that greedy decoding wanders instead of repeating one token
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "attn_implementation": "eager",
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "llama3": (
        "Llama",
        {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
    "mistral": ("Mistral", {"sliding_window": 24, "head_dim": 32}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": False}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 32, "initializer_range": 0.7}),
}


def build(variant: str) -> Any:
    """The transformers model of a variant, always with the same weights, biases and norms away from their neutral values."""
    import transformers

    family, changes = VARIANTS[variant]
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **changes})
    torch.manual_seed(11)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.2)
            elif "norm" in name:
                parameter.uniform_(0.6, 1.4)
    return model


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Threads that wait for each other crawl when a test machine is busy."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def reference() -> Callable[[str], Any]:
    """Variant name → transformers model, built once."""
    built: dict[str, Any] = {}

    def get(variant: str) -> Any:
        if variant not in built:
            built[variant] = build(variant)
        return built[variant]

    return get


@pytest.fixture(scope="session")
def checkpoint(reference: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Variant name (and save_pretrained options) → directory."""
    saved: dict[tuple[Any, ...], Path] = {}

    def get(variant: str, **options: Any) -> Path:
        key = (variant, *sorted(options.items()))
        if key not in saved:
            saved[key] = tmp_path_factory.mktemp(variant)
            reference(variant).save_pretrained(saved[key], **options)
        return saved[key]

    return get


@pytest.fixture(scope="session")
def loaded(checkpoint: Callable[..., Path]) -> Callable[..., Any]:
    from engine.linear import _measured_path as measured_path
    from engine.load import load_model

    models: dict[tuple[str, str, str], Any] = {}

    def get(variant: str, dtype: str = "float32", backend: str = "native") -> Any:
        key = (variant, dtype, backend)
        if key not in models:
            with pytest.MonkeyPatch.context() as patch:
                if backend == "torch":
                    patch.setattr("engine.linear.load_kernels", lambda: None)
                measured_path.cache_clear()
                models[key] = load_model(str(checkpoint(variant)), dtype, block_size=BLOCK_SIZE)
        return models[key]

    return get


@pytest.fixture(params=["native", "torch"])
def executor(loaded: Callable[..., Any], request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Variant name → a fresh executor with zeroed KV memory; each test runs over our kernels and over plain torch."""
    from engine.torch_executor import TorchExecutor

    def make(variant: str, dtype: str = "float32") -> Any:
        model = loaded(variant, dtype, request.param)
        kv = torch.zeros(NUM_BLOCKS, *model.layout.shape, dtype=getattr(torch, dtype))
        return TorchExecutor(model, kv)

    return make
