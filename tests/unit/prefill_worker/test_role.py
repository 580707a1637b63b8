"""What a prefill worker's role answers to the step loop."""

from __future__ import annotations

import pytest

from core.errors import InvalidRequestError
from core.request import AttemptKey, WorkItem
from engine.role import Shortage, Terms
from prefill_worker.role import PrefillRole
from tandem.sampling import SamplingParams

ITEM = WorkItem(AttemptKey("a", 0), (1, 2), 2, SamplingParams(max_tokens=4, seed=1))


def test_prompts_enter_to_be_handed_over_under_a_lease() -> None:
    assert PrefillRole(lease_s=7.0).enter(ITEM, resident=False) == Terms(hand_over=True, lease_s=7.0)


def test_kv_of_others_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="hand KV to a decode worker"):
        PrefillRole(lease_s=7.0).enter(ITEM, resident=True)


def test_prompts_fill_the_step_and_a_victim_waits_here() -> None:
    role = PrefillRole(lease_s=7.0)
    assert role.prefill_tokens(left=200, decode_rows=5) == 200
    assert role.on_shortage() is Shortage.REQUEUE


def test_a_lease_has_a_length() -> None:
    with pytest.raises(AssertionError):
        PrefillRole(lease_s=0.0)
