"""What a decode worker's role answers to the step loop."""

from __future__ import annotations

import pytest

from core.request import AttemptKey, WorkItem
from decode_worker.role import DecodeRole
from engine.role import Shortage, Terms
from tandem.sampling import SamplingParams

ITEM = WorkItem(AttemptKey("a", 0), (1, 2), 2, SamplingParams(max_tokens=4, seed=1))


@pytest.mark.parametrize("resident", [False, True])
def test_what_enters_stays_to_its_end(resident) -> None:
    assert DecodeRole().enter(ITEM, resident) == Terms(hand_over=False)


@pytest.mark.parametrize(("left", "decode_rows", "tokens"), [(200, 0, 200), (200, 1, 64), (10, 1, 10)])
def test_prompts_are_kept_small_beside_streams(left, decode_rows, tokens) -> None:
    assert DecodeRole(chunk_tokens=64).prefill_tokens(left, decode_rows) == tokens


def test_a_victim_goes_back_to_the_router() -> None:
    assert DecodeRole().on_shortage() is Shortage.GIVE_BACK
