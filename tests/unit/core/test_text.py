"""Tokenizer: files, framing, chat templates, decoding. The comparison with transformers is in tests/service."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from core.errors import ConfigError
from core.text import Tokenizer
from tandem.errors import InvalidRequestError

CORPUS = ["def f(x):\n    return x + 1\n", "the cat sat on the mat", "Grüße 漢字 😀 👩‍👩‍👧", "été naïve café"] * 4
SPECIALS = ["<s>", "</s>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + m.role) }}{% endif %}<|{{ m.role }}|>{{ m.content | trim }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_level_backend() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=330, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_tokens(["naïve plain"])  # an added token that is not special keeps its own spelling
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return backend


def sentencepiece_backend() -> tokenizers.Tokenizer:
    """The shape of Llama 2's and Mistral's tokenizer.json: BPE with byte fallback."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for piece in ["▁", "h", "e", "l", "o", "w", "r", "d", "▁h", "▁w", "he", "or", "é"]:
        vocab[piece] = len(vocab)
    merges = [("▁", "h"), ("▁", "w"), ("h", "e"), ("o", "r")]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return backend


BACKEND = byte_level_backend()
TOKENIZER = Tokenizer(BACKEND)


def write_model(folder: Path, **files: Any) -> Path:
    folder.mkdir(exist_ok=True)
    BACKEND.save(str(folder / "tokenizer.json"))
    defaults: dict[str, Any] = {
        "tokenizer_config": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": {"__type": "AddedToken", "content": "</s>"},
            "chat_template": TEMPLATE,
            "add_bos_token": False,  # tokenizer.json wins
        },
        "generation_config": {"eos_token_id": [1, 3]},
        "config": {"vocab_size": 512, "eos_token_id": 1, "model_type": "llama"},
    }
    for name, tree in {**defaults, **files}.items():
        if tree is not None:
            (folder / f"{name}.json").write_text(json.dumps(tree))
    return folder


@given(st.text())
def test_decoding_what_was_encoded_gives_the_text_back(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    if not TOKENIZER.special_token_ids.intersection(ids):
        assert TOKENIZER.decode(ids) == text


@given(st.lists(st.integers(0, 400), max_size=30))
def test_byte_level_decoding_equals_the_library_for_any_ids(ids: list[int]) -> None:
    known = [i for i in ids if BACKEND.id_to_token(i) is not None]
    assert TOKENIZER.decode(ids) == BACKEND.decode(known, skip_special_tokens=True)


@given(st.text(alphabet=st.sampled_from("helo wrdé漢😀 \n")))
def test_byte_fallback_decoding_equals_the_library_up_to_the_first_space(text: str) -> None:
    backend = sentencepiece_backend()
    tokenizer = Tokenizer(backend)
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.decode(ids)
    assert whole[1:] == backend.decode(ids)
    assert whole == (" " + text if text else "")


def test_a_plain_prompt_is_framed_by_the_post_processor_and_a_chat_by_its_template(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(str(write_model(tmp_path)))
    cat = tokenizer.encode("cat", add_special_tokens=False)
    assert tokenizer.encode("cat") == [0, *cat]
    chat = tokenizer.chat([{"role": "user", "content": " cat "}])
    assert chat == [0, 2, *cat, 1, 3]
    assert tokenizer.has_chat_template


def test_the_template_file_wins_and_the_helpers_are_there(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    program = (
        "{% for m in messages %}{% if loop.index0 > 1 %}{% break %}{% endif %}{{ m | tojson }}"
        "{% generation %}{{ strftime_now('%Y')[:2] }}{% endgeneration %}{% endfor %}"
    )
    (folder / "chat_template.jinja").write_text(program)
    tokenizer = Tokenizer.load(str(folder))
    text = tokenizer.decode(tokenizer.chat([{"role": "user", "content": "<é>"}] * 3))
    assert text == '{"role": "user", "content": "<é>"}20' * 2


def test_named_templates_use_the_default(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    tokenizer = Tokenizer.load(str(write_model(tmp_path, tokenizer_config={"chat_template": named})))
    assert tokenizer.decode(tokenizer.chat([{"role": "user", "content": "x"}])) == "plain"


def test_the_template_cannot_leave_its_sandbox(tmp_path: Path) -> None:
    program = "{{ messages.append(1) }}{{ ''.__class__.__mro__ }}"
    tokenizer = Tokenizer.load(str(write_model(tmp_path, tokenizer_config={"chat_template": program})))
    with pytest.raises(InvalidRequestError):
        tokenizer.chat([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    ("program", "says"),
    [("{{ raise_exception('roles must alternate') }}", "roles must alternate"), ("{{ 1 + 'a' }}", "TypeError")],
)
def test_a_refusing_template_is_the_callers_mistake(tmp_path: Path, program: str, says: str) -> None:
    tokenizer = Tokenizer.load(str(write_model(tmp_path, tokenizer_config={"chat_template": program})))
    with pytest.raises(InvalidRequestError, match=says):
        tokenizer.chat([{"role": "user", "content": "x"}])


def test_no_template_refuses_chats_only(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(str(write_model(tmp_path, tokenizer_config={})))
    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequestError, match="plain prompt"):
        tokenizer.chat([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    ("files", "ids"),
    [
        ({}, (1, 3)),
        ({"generation_config": None}, (1,)),
        ({"generation_config": {"eos_token_id": 2}}, (2,)),
        ({"generation_config": None, "config": {}}, (1,)),
        ({"generation_config": None, "config": {}, "tokenizer_config": {}}, ()),
    ],
)
def test_where_the_ids_that_end_a_turn_come_from(tmp_path: Path, files: dict[str, Any], ids: tuple[int, ...]) -> None:
    assert Tokenizer.load(str(write_model(tmp_path, **files))).eos_token_ids == ids


def test_the_vocabulary_is_the_models_where_padded(tmp_path: Path) -> None:
    assert Tokenizer.load(str(write_model(tmp_path))).vocab_size == 512
    tokenizer = Tokenizer.load(str(write_model(tmp_path, config={"vocab_size": 3})))
    assert tokenizer.vocab_size == BACKEND.get_vocab_size(with_added_tokens=True)
    assert tokenizer.decode([511]) == ""


def break_file(folder: Path, name: str, text: str | None) -> None:
    if text is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("tokenizer.json", None, "no tokenizer.json"),
        ("tokenizer.json", '{"version": "1.0", "mod', "cannot be read as a tokenizer"),
        ("tokenizer_config.json", "{", "not readable JSON"),
        ("generation_config.json", "[1]", "must hold a JSON object"),
        ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id must be"),
        ("tokenizer_config.json", '{"chat_template": 3}', "chat_template"),
        ("tokenizer_config.json", '{"chat_template": "{% if %}"}', "not valid Jinja"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, text: str | None, says: str) -> None:
    folder = write_model(tmp_path)
    break_file(folder, name, text)
    with pytest.raises(ConfigError, match=says):
        Tokenizer.load(str(folder))


@pytest.mark.parametrize("path", ["/no/such/model", "./missing", "nowhere"])
def test_a_directory_that_is_not_there_is_said_so(path: str) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        Tokenizer.load(path)


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"U\+D83D.*character 2"):
        TOKENIZER.encode("ab\ud83d")


def test_one_token_can_be_shown_alone() -> None:
    half = TOKENIZER.encode("😀", add_special_tokens=False)
    assert b"".join(TOKENIZER.token_bytes(i) for i in half) == "😀".encode()
    assert TOKENIZER.token_bytes(0) == b"<s>"
    assert TOKENIZER.token_bytes(10**6) == b""
