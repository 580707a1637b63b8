"""Random models of known size, in Hugging Face form, for measuring engines: weights do not change the speed.

`m15` has about 15 million parameters, `m125` about 110 million; both use the demo model's tokenizer. They repeat one token
for ever, always one that is text: streams of servers can then be compared chunk by chunk.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import HOME
from core.config import DEMO_MODEL

SHAPES: dict[str, dict[str, Any]] = {
    "m15": {
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 7,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    },
    "m125": {
        "hidden_size": 768,
        "intermediate_size": 2560,
        "num_hidden_layers": 14,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
    },
}
CONTEXT = 4096


def make(name: str) -> Path:
    """The folder of a model, written on first use."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM  # the dev extras; slow to import

    folder = HOME / "models" / name
    if (folder / "model.safetensors").exists():
        return folder
    demo = Path(DEMO_MODEL)
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (demo / file).exists():
            shutil.copy(demo / file, folder / file)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        dtype="bfloat16",
        **SHAPES[name],
    )
    model = LlamaForCausalLM(config).bfloat16()
    texts = AutoTokenizer.from_pretrained(folder).batch_decode([[index] for index in range(config.vocab_size)])
    never = torch.tensor([not text.isprintable() or not text.isascii() or not text for text in texts])
    model.get_input_embeddings().weight.data[never] = 0.0  # the head is tied: scores of zero, and others are above
    model.save_pretrained(folder)
    return folder
