"""Streaming detokenisation and stop strings: properties over arbitrary text, arbitrary ids, arbitrary cuts."""

from __future__ import annotations

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from core.detokenize import WindowDecoder
from core.text import StopMatcher, StreamDecoder, Tokenizer


def backend(words: list[str]) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        words, trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False)
    )
    return made


BYTE_LEVEL = Tokenizer(backend(["return self.x", "the mat", "😀 漢字"]))
_FALLBACK_VOCAB = {
    "<unk>": 0,
    **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)},
    **{piece: 257 + i for i, piece in enumerate(["▁", "▁the", "cat", "é"])},
}


def fallback_backend() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE(_FALLBACK_VOCAB, [], unk_token="<unk>", byte_fallback=True))
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return made


FALLBACK = Tokenizer(fallback_backend())
IDS = st.lists(st.integers(0, 310), max_size=40)


def run(decoder: StreamDecoder, ids: list[int]) -> tuple[list[str], str]:
    return [decoder.push(i) for i in ids], decoder.flush()


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, FALLBACK])
@given(ids=IDS)
def test_pieces_join_to_the_whole_for_any_ids(tokenizer: Tokenizer, ids: list[int]) -> None:
    pieces, tail = run(tokenizer.stream(), ids)
    assert "".join(pieces) + tail == tokenizer.decode(ids)


@given(st.text(max_size=60))
def test_no_character_is_ever_split_or_repaired(text: str) -> None:
    """Every prefix of what was sent is a prefix of the text, so nothing shown was wrong, not even for a moment."""
    ids = BYTE_LEVEL.encode(text, add_special_tokens=False)
    shown = ""
    decoder = BYTE_LEVEL.stream()
    for token_id in ids:
        shown += decoder.push(token_id)
        if 0 not in ids:
            assert text.startswith(shown)
    assert shown + decoder.flush() == BYTE_LEVEL.decode(ids)


def test_an_emoji_of_four_tokens_comes_out_once_whole() -> None:
    plain = Tokenizer(backend(["x"]))
    ids = plain.encode("a👩‍👧b", add_special_tokens=False)
    assert len(ids) == 1 + 4 + 3 + 4 + 1
    pieces, tail = run(plain.stream(), ids)
    assert [p for p in pieces if p] == ["a", "👩", "\u200d", "👧", "b"]
    assert tail == ""


def test_a_character_cut_off_by_the_end_becomes_one_replacement() -> None:
    plain = Tokenizer(backend(["x"]))
    ids = plain.encode("a😀", add_special_tokens=False)[:-1]
    assert run(plain.stream(), ids) == (["a", "", "", ""], "\ufffd")


@given(IDS, st.integers(0, 40))
def test_a_decoder_rebuilt_from_the_token_log_goes_on_the_same(ids: list[int], cut: int) -> None:
    undisturbed, tail = run(BYTE_LEVEL.stream(), ids)
    again = BYTE_LEVEL.stream()
    for token_id in ids[:cut]:
        again.push(token_id)
    assert [again.push(i) for i in ids[cut:]] == undisturbed[cut:]
    assert again.flush() == tail


def metaspace_backend() -> tokenizers.Tokenizer:
    vocab = {piece: i for i, piece in enumerate(["<unk>", "▁the", "▁cat", "s", "▁", "é", "."])}
    made = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    made.decoder = decoders.Metaspace()
    return made


@given(st.lists(st.integers(1, 6), max_size=40))
def test_the_window_decoder_agrees_with_decoders_that_look_at_neighbours(ids: list[int]) -> None:
    tokenizer = Tokenizer(metaspace_backend())
    decoder = tokenizer.stream()
    assert isinstance(decoder, WindowDecoder)
    pieces, tail = run(decoder, ids)
    assert "".join(pieces) + tail == tokenizer.decode(ids)


@given(st.text(max_size=40).filter(lambda t: "<s>" not in t))
def test_the_window_decoder_splits_no_character_either(text: str) -> None:
    ids = BYTE_LEVEL.encode(text, add_special_tokens=False)
    decoder = WindowDecoder(BYTE_LEVEL.decode)
    pieces, tail = run(decoder, ids)
    assert "".join(pieces) + tail == text


def test_the_window_decoder_holds_back_a_bounded_number_of_tokens() -> None:
    seen: list[int] = []

    def decode(ids: list[int]) -> str:
        seen.append(len(ids))
        return "\ufffd" * len(ids)

    decoder = WindowDecoder(decode)  # type: ignore[arg-type]
    pieces, tail = run(decoder, [1] * 100)
    assert "".join(pieces) + tail == "\ufffd" * 100
    assert max(seen) <= 32


# ---- stop strings --------------------------------------------------------------------------------------------------


def first_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """The specification, character by character."""
    for end in range(1, len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            return text[: end - max(map(len, hits))], True
    return text, False


FEW = st.sampled_from("ab\n")
STOPS = st.lists(st.text(FEW, min_size=1, max_size=6), max_size=5)


@given(st.lists(st.text(FEW, max_size=5), max_size=12), STOPS)
def test_stop_strings_are_found_however_the_text_is_cut(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown, stopped, text = "", False, ""
    expected, expected_stop = first_stop("".join(pieces), stops)
    for piece in pieces:
        text += piece
        matched = matcher.push(piece)
        shown, stopped = shown + matched.text, matched.stopped
        assert expected.startswith(shown), "text that belongs to a stop string was shown"
        assert stopped == first_stop(text, stops)[1], "a stop string was found late or never"
    assert (shown + matcher.flush(), stopped) == (expected, expected_stop)


@given(st.lists(st.text(FEW, max_size=5), max_size=12), STOPS)
def test_no_more_is_held_back_than_may_begin_a_stop_string(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    text = shown = ""
    for piece in pieces:
        text += piece
        matched = matcher.push(piece)
        shown += matched.text
        if not matched.stopped:
            held = text[len(shown) :]
            assert not held or any(stop.startswith(held) for stop in stops)


def test_a_long_hostile_stop_string_is_held_back_and_found() -> None:
    matcher = StopMatcher(["a" * 1000 + "b"])
    shown = "".join(matcher.push("a" * 10).text for _ in range(5_000))
    assert len(shown) == 49_000
    assert matcher.push("b") == ("", True)
    assert matcher.push("more") == ("", True)
    assert matcher.flush() == ""
