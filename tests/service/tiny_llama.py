"""A random Llama small enough to load in a moment: what is tested with it is the way of a request, not the text."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file

from engine.load import read_spec
from engine.weights import expected_shapes

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "vocab_size": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 1,
    "torch_dtype": "float32",
}


@cache
def tiny_llama() -> str:
    """Its directory, made once per process and removed at its end."""
    folder = Path(tempfile.mkdtemp(prefix="tiny-llama-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for name, shape in expected_shapes(read_spec(folder)).items():
        # Wide, or a random model repeats one token and hides every mistake; norms stay at one.
        weights[name] = torch.ones(shape) if "norm" in name else torch.randn(shape, generator=generator) * 0.4
    save_file(weights, folder / "model.safetensors")
    return str(folder)
