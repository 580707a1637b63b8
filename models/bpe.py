"""The demo model's tokenizer: byte-level BPE, its special tokens and its chat template."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from models.corpus import Message

PAD, BOS, EOS, END = "<pad>", "<s>", "</s>", "<|end|>"
ROLES = {role: f"<|{role}|>" for role in ("system", "user", "assistant")}
SPECIAL = [PAD, BOS, EOS, *ROLES.values(), END]

CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|' + message['role'] + '|>\\n' + (message['content'] | trim) + '<|end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}"
)

# A word takes one leading sign along (" return", "_name", ".append", "(self"), digits stand
# alone, and line breaks never join their neighbours, so a prompt may end right after one.
PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|[\r\n]+|[^\S\r\n]+(?!\S)|[^\S\r\n]+"


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that must be there."""
    number = tokenizer.token_to_id(token)
    if number is None:
        raise KeyError(token)
    return number


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn the merges; every byte is in the vocabulary, so any text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=24,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A $B",
        special_tokens=[(BOS, token_id(tokenizer, BOS))],
    )
    return tokenizer


class Encoder:
    """Turns documents into token ids, special tokens only where they are meant."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        # Markup such as "<s>" in the sources is text and must not become a control token.
        self.tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self.tokenizer.encode_special_tokens = True
        self.special = {token: token_id(tokenizer, token) for token in SPECIAL}

    def text(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def document(self, text: str) -> list[int]:
        """``<s> text </s>``"""
        return [self.special[BOS], *self.text(text), self.special[EOS]]

    def chat(self, messages: Iterable[Message]) -> list[int]:
        """The chat template, token for token."""
        newline = self.text("\n")
        ids = [self.special[BOS]]
        for role, content in messages:
            body = self.text("\n" + content.strip())
            ids += [self.special[ROLES[role]], *body, self.special[END], *newline]
        return ids


def save_tokenizer(tokenizer: Tokenizer, out: Path, max_length: int) -> None:
    """Write the files that ``AutoTokenizer`` reads."""
    tokenizer.save(str(out / "tokenizer.json"))
    named = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    extra = [*ROLES.values(), END]
    files = {
        "special_tokens_map.json": {**named, "additional_special_tokens": extra},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **named,
            "additional_special_tokens": extra,
            "model_max_length": max_length,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    }
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n")
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE)
