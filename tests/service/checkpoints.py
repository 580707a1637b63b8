"""Tiny random checkpoints of every architecture we load, saved by `transformers`, and its own greedy tokens for them."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch

from core.config import DEMO_MODEL

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.4,  # wide and untied, or a random model repeats one token and hides every mistake
    "tie_word_embeddings": False,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral")
MODELS = (*ARCHITECTURES, "demo")


def make_checkpoint(name: str, folder: Path) -> Path:
    """A model directory; `demo` is the one that ships."""
    if name == "demo":
        return Path(DEMO_MODEL)
    import transformers

    vocab = len(_tokenizer_vocabulary())
    shape = {**SHAPE, "vocab_size": vocab}
    config: Any
    if name == "llama":
        config, build = transformers.LlamaConfig(**shape, rope_parameters=LLAMA3_ROPE), transformers.LlamaForCausalLM
    elif name == "qwen2":
        config, build = transformers.Qwen2Config(**shape), transformers.Qwen2ForCausalLM
    elif name == "qwen3":
        config, build = transformers.Qwen3Config(**shape, head_dim=24), transformers.Qwen3ForCausalLM
    else:
        config, build = transformers.MistralConfig(**shape, sliding_window=48), transformers.MistralForCausalLM
    torch.manual_seed(ARCHITECTURES.index(name))
    model = build(config)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)  # zeros would hide a bias that is not added
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (Path(DEMO_MODEL) / file).exists():
            shutil.copy(Path(DEMO_MODEL) / file, folder / file)
    return folder


def greedy_of_transformers(folder: Path, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """What `transformers` generates greedily in float32, one prompt at a time, end-of-sequence ignored."""
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        model.generation_config.eos_token_id = None
        outputs = [
            model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=max_tokens, pad_token_id=0)
            for prompt in prompts
        ]
    return [output[0, len(prompt) :].tolist() for prompt, output in zip(prompts, outputs, strict=True)]


def _tokenizer_vocabulary() -> dict[str, int]:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(Path(DEMO_MODEL) / "tokenizer.json")).get_vocab()
