"""Prompts and chats are framed and decoded as transformers does it, for the demo model and for saved tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, processors

from core.config import DEMO_MODEL
from core.text import Tokenizer

TEXTS = ["", " ", "def f(x):\n\treturn x  # é 漢字 😀👩‍👩‍👧\n\n", "<s> and </s> in the text", "\x00\ufffd\u200d"]


def load(folder: str) -> tuple[Tokenizer, Any]:
    return Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", TEXTS)
def test_the_demo_models_prompts(text: str) -> None:
    ours, theirs = load(DEMO_MODEL)
    assert ours.encode(text) == theirs(text)["input_ids"]
    ids = ours.encode(text, add_special_tokens=False)
    assert ids == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_the_demo_models_chats() -> None:
    ours, theirs = load(DEMO_MODEL)
    messages = [
        {"role": "system", "content": "Answer in Python."},
        {"role": "user", "content": " a loop\n"},
        {"role": "assistant", "content": "for i in x: pass"},
        {"role": "user", "content": "<&> 😀"},
    ]
    for count in (2, 4):
        framed = theirs.apply_chat_template(messages[:count], add_generation_prompt=True, tokenize=False)
        assert ours.chat(messages[:count]) == theirs(framed, add_special_tokens=False)["input_ids"]


def sentencepiece_like() -> tokenizers.Tokenizer:
    """The shape of Llama 2's and Mistral's tokenizer.json: BPE with byte fallback."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    for piece in ["▁", "h", "e", "l", "o", "w", "r", "d", "▁h", "▁w", "he", "or"]:
        vocab[piece] = len(vocab)
    merges = [("▁", "h"), ("▁", "w"), ("h", "e"), ("o", "r")]
    made = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


@pytest.mark.parametrize("add_bos", [True, False])
def test_a_tokenizer_with_byte_fallback(tmp_path: Path, add_bos: bool) -> None:
    """`add_bos_token` in the configuration changes nothing: tokenizer.json says how a prompt is framed."""
    saved = transformers.PreTrainedTokenizerFast(
        tokenizer_object=sentencepiece_like(), bos_token="<s>", eos_token="</s>", unk_token="<unk>", add_bos_token=add_bos
    )
    saved.save_pretrained(str(tmp_path))
    ours, theirs = load(str(tmp_path))
    for text in ("hello world", "é漢😀 w"):
        ids = ours.encode(text)
        assert ids == theirs(text)["input_ids"]
        stream = ours.stream()
        pieces = [stream.push(i) for i in ids]
        assert "".join(pieces) + stream.flush() == " " + theirs.decode(ids, skip_special_tokens=True)
    assert ours.eos_token_ids == (2,)
