"""Lengths and keys of one request inside the engine."""

from __future__ import annotations

import pytest

from core.blocks import block_keys, root_key
from core.request import FinishReason
from engine.role import Terms
from engine.sequence import Sequence

ROOT = root_key(b"fake")


@pytest.fixture
def sequence(item):
    return lambda **kwargs: Sequence(0, item("a", range(10), **{"max_tokens": 4, **kwargs}), Terms(False), ROOT, now=2.0)


def test_rows_cover_what_has_no_kv_and_only_the_last_asks_for_a_token(sequence) -> None:
    s = sequence()
    s.place([5, 6, 7], 4)
    chunk = s.row(3)
    assert (chunk.start, list(chunk.token_ids), list(chunk.blocks), chunk.sample) == (4, [4, 5, 6], [5, 6, 7], None)
    last = s.row(6)
    assert (last.sample.position, last.sample.prompt_len, last.sample.history) == (0, 10, list(range(10)))


def test_keys_are_those_of_the_chain_however_they_are_asked_for(sequence) -> None:
    s = sequence(max_tokens=30)
    tokens = list(range(10))
    assert s.keys_until(1, 4) == block_keys(ROOT, tokens, 4)[:1]
    for token in range(50, 63):
        s.append(token)
        tokens.append(token)
        assert s.keys_until(len(tokens) // 4, 4) == block_keys(ROOT, tokens, 4)


@pytest.mark.parametrize(
    ("sampling", "tokens", "reasons"),
    [
        ({"max_tokens": 2}, [7, 8], [None, FinishReason.LENGTH]),
        ({"eos": (8,)}, [7, 8], [None, FinishReason.STOP]),
        ({"eos": (8,), "ignore_eos": True}, [7, 8], [None, None]),
        ({"eos": (8,), "max_tokens": 2}, [7, 8], [None, FinishReason.STOP]),
        ({"stop_token_ids": (7,), "ignore_eos": True}, [7], [FinishReason.STOP]),
    ],
)
def test_when_a_request_ends(sequence, sampling, tokens, reasons) -> None:
    s = sequence(**sampling)
    assert [s.append(token) for token in tokens] == reasons


def test_lengths_are_checked_at_birth_and_when_placed(sequence) -> None:
    with pytest.raises(AssertionError, match="finished"):
        sequence(generated=[1, 2, 3, 4])
    with pytest.raises(AssertionError, match="last token must be computed"):
        sequence().place([1, 2, 3], 10)


def test_evicting_keeps_tokens_and_keys(sequence) -> None:
    s = sequence()
    s.place([1, 2, 3], 8)
    keys = s.keys_until(2, 4)
    assert s.evict() == [1, 2, 3]
    assert (s.pending, s.missing_blocks(4), s.keys) == (10, 3, keys)


def test_a_deadline_is_a_length_from_arrival(sequence) -> None:
    assert sequence(remaining_s=3.0).deadline == 5.0
    assert sequence().deadline == float("inf")
