"""Text of a model: tokenizer, chat template and the ids that end a turn, read from a Hugging Face directory.

A `Tokenizer` is immutable and thread-safe; `encode` releases the interpreter lock, so a long prompt belongs in a thread.
Decoding follows the tokenizer's own decoder with two deliberate differences: text is never "cleaned up" (no spaces
removed before punctuation), and the text of SentencePiece tokens keeps its leading space, because it continues the prompt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from core.chat_template import ChatTemplate
from core.config import hub_token
from core.detokenize import Matched, PieceDecoder, StopMatcher, StreamDecoder, WindowDecoder
from core.errors import ConfigError
from tandem.errors import InvalidRequestError

__all__ = ["Matched", "StopMatcher", "StreamDecoder", "Tokenizer"]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "config.json",
)


class Tokenizer:
    """Text to token ids and back, for one model."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        eos_token_ids: Sequence[int] = (),
        vocab_size: int = 0,
    ) -> None:
        """`Tokenizer.load` is the usual way. `vocab_size` is the model's, where it is padded beyond the tokenizer's."""
        self._backend = backend
        self._special_tokens = dict(special_tokens or {})
        self._template = ChatTemplate(chat_template, self._special_tokens) if chat_template else None
        self._to_bytes = _bytes_of_token(json.loads(backend.to_str())["decoder"])
        self._pieces: dict[int, bytes] = {}
        added = backend.get_added_tokens_decoder()
        self.special_token_ids = frozenset(i for i, token in added.items() if token.special)
        self.eos_token_ids = tuple(eos_token_ids)
        self.vocab_size = max(vocab_size, backend.get_vocab_size(with_added_tokens=True))

    @classmethod
    def load(cls, path: str) -> Tokenizer:
        """Reads a Hugging Face directory, or downloads the tokenizer's files of a Hub id.

        Raises ConfigError naming the file that is missing or broken and what to do.
        """
        folder = _folder(path)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ConfigError(
                f"{folder} has no tokenizer.json; save the tokenizer in the fast format "
                "(AutoTokenizer.from_pretrained(...).save_pretrained(...)) or point model.path at a complete model directory"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(f"{file} cannot be read as a tokenizer: {error}; download the model again") from None
        backend.no_truncation()
        backend.no_padding()
        config = _json(folder / "tokenizer_config.json")
        model = _json(folder / "config.json")
        special = _special_tokens(config, _json(folder / "special_tokens_map.json"))
        return cls(
            backend,
            special_tokens=special,
            chat_template=_chat_template(folder, config),
            eos_token_ids=_eos_ids(backend, _json(folder / "generation_config.json"), model, special),
            vocab_size=int(model.get("vocab_size") or 0),
        )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; with `add_special_tokens` framed as tokenizer.json frames a plain prompt (often a BOS first).

        Raises InvalidRequestError when the text holds lone surrogates, which no UTF-8 text has.
        """
        _check_encodable(text)
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation (`role` and `content` each) up to where the assistant speaks next.

        Raises InvalidRequestError when the model has no chat template or its template refuses the messages.
        """
        if self._template is None:
            raise InvalidRequestError("this model has no chat template; send a plain prompt instead of messages")
        return self.encode(self._template.render(messages), add_special_tokens=False)

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the ids without special tokens; malformed bytes become U+FFFD, ids without a token become nothing."""
        if self._to_bytes is None:
            return self._decode_window(token_ids)
        return b"".join(map(self._piece, token_ids)).decode("utf-8", "replace")

    def stream(self) -> StreamDecoder:
        """A fresh incremental decoder; its pieces join to `decode` of the tokens pushed."""
        return PieceDecoder(self._piece) if self._to_bytes is not None else WindowDecoder(self._decode_window)

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for, special tokens by their name: for showing log-probabilities."""
        name = self._backend.id_to_token(token_id)
        if name is None:
            return b""
        if token_id in self.special_token_ids:
            return name.encode()
        return self._piece(token_id) if self._to_bytes is not None else self._decode_window([token_id]).encode()

    def _piece(self, token_id: int) -> bytes:
        piece = self._pieces.get(token_id)
        if piece is None:  # at most one entry per id of the vocabulary
            piece = self._pieces[token_id] = self._make_piece(token_id)
        return piece

    def _make_piece(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        if token is None or token_id in self.special_token_ids or self._to_bytes is None:
            return b""
        return self._to_bytes(token)

    def _decode_window(self, token_ids: Sequence[int]) -> str:
        known = [i for i in token_ids if self._backend.id_to_token(i) is not None]
        return str(self._backend.decode(known, skip_special_tokens=True))


def _check_encodable(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"the text holds a lone surrogate (U+{ord(text[error.start]):04X}) at character {error.start}; "
            "send whole characters"
        ) from None


# ---- decoders whose text is a concatenation of per-token bytes ---------------------------------------------------

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _bytes_of_token(decoder: Mapping[str, Any] | None) -> Callable[[str], bytes] | None:
    """How a token's name becomes bytes, or None when the decoder needs its neighbours."""
    if decoder is None:
        return None
    if decoder["type"] == "ByteLevel":
        return _byte_level
    steps = decoder.get("decoders", []) if decoder["type"] == "Sequence" else []
    kinds = [step["type"] for step in steps]
    if kinds[:2] == ["Replace", "ByteFallback"] and set(kinds[2:]) <= {"Fuse", "Strip"}:
        pattern, content = steps[0]["pattern"].get("String"), steps[0]["content"]
        if pattern is not None:
            return lambda token: _byte_fallback(token, pattern, content)
    return None


def _byte_level(token: str) -> bytes:
    try:
        return bytes(map(_BYTE_OF_CHAR.__getitem__, token))
    except KeyError:  # an added token, spelled in plain text
        return token.encode()


def _byte_fallback(token: str, pattern: str, content: str) -> bytes:
    if match := _BYTE_TOKEN.fullmatch(token):
        return bytes((int(match[1], 16),))
    return token.replace(pattern, content).encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes as printable characters: itself where printable, else the next code point from 256."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(b): b for b in printable}
    hidden = (b for b in range(256) if b not in set(printable))
    return table | {chr(256 + i): b for i, b in enumerate(hidden)}


_BYTE_OF_CHAR = _byte_alphabet()


# ---- the files beside tokenizer.json -------------------------------------------------------------------------------


def _folder(path: str) -> Path:
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or path.startswith((".", "~")) or path.count("/") != 1:
        raise ConfigError(f"the model directory {path} does not exist; set model.path to a Hugging Face directory or a Hub id")
    import huggingface_hub  # only a Hub id needs it

    try:
        return Path(huggingface_hub.snapshot_download(path, allow_patterns=list(TOKENIZER_FILES), token=hub_token()))
    except Exception as error:
        raise ConfigError(f"cannot fetch the tokenizer of {path} from the Hub: {error}") from None


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} is not readable JSON: {error}; download the model again") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{file} must hold a JSON object, found {type(tree).__name__}; download the model again")
    return tree


def _special_tokens(*trees: Mapping[str, Any]) -> dict[str, Any]:
    """`bos_token` … by name, as plain strings; the first file that names one wins."""
    found: dict[str, Any] = {}
    for tree in trees:
        for name in ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"):
            value = tree.get(name)
            content = value.get("content") if isinstance(value, dict) else value
            if isinstance(content, str):
                found.setdefault(name, content)
    return found


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"{file} cannot be read: {error}") from None
    template = config.get("chat_template") or _json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise ConfigError(f"the chat_template of {folder} must be text or a list of named templates")
    return template


def _eos_ids(
    backend: tokenizers.Tokenizer, generation: Mapping[str, Any], model: Mapping[str, Any], special: Mapping[str, Any]
) -> tuple[int, ...]:
    """Ids that end a turn: generation_config.json, else config.json, else the tokenizer's eos_token."""
    for tree in (generation, model):
        value = tree.get("eos_token_id")
        if value is not None:
            ids = value if isinstance(value, list) else [value]
            if not all(isinstance(i, int) and i >= 0 for i in ids):
                raise ConfigError(f"eos_token_id must be a token id or a list of them, found {value!r}")
            return tuple(dict.fromkeys(ids))
    eos = backend.token_to_id(special["eos_token"]) if "eos_token" in special else None
    return () if eos is None else (eos,)
