"""Who decoded beside a request: averages over its life, and what costs are learned from them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_placing import D, P, view, worker

from core.cost_model import StepCost
from core.request import AttemptTiming
from router.calibration import OUTCOMES_MIN, Calibration
from router.facts import Facts
from router.forecast_pair import forecast
from router.occupancy import WORKERS_MAX, Mark, Occupancy
from router.policy import Need, Pair
from router.situation import Situation
from router.view import NOTHING, Claims, Held

PAIR = Pair("p0", "d0")
CHANGES = st.lists(st.tuples(st.floats(0, 10), st.integers(0, 50), st.integers(0, 50), st.integers(0, 10_000)), max_size=30)


@given(CHANGES, st.data())
def test_the_mean_is_that_of_what_was_there(changes, data):
    known, now, spans = Occupancy(), 5.0, []
    begin = data.draw(st.integers(0, len(changes)))
    begun = None
    for number, (past_s, rows, coming, context) in enumerate(changes):
        if number == begin:
            begun = known.mark("d0", now)
        known.changed("d0", now, Held(running=rows + coming, coming=coming, context_tokens=context))
        held = context * rows / (rows + coming) if rows + coming else 0.0
        if number >= begin:
            spans.append((past_s, rows, held))
        now += past_s
    whole_s = sum(past_s for past_s, *_ in spans)
    if begun is None or whole_s <= 1e-6:
        return
    found = known.since(begun, now)
    assert found is not None
    assert found[0] == pytest.approx(sum(s * rows for s, rows, _ in spans) / whole_s, rel=1e-6, abs=1e-6)
    assert found[1] == pytest.approx(sum(s * held for s, _, held in spans) / whole_s, rel=1e-6, abs=1e-3)


def test_who_is_forgotten_or_never_seen_has_no_mean():
    known = Occupancy()
    assert known.since(Mark("d0", 1.0, 0.0, 0.0), 2.0) is None
    known.changed("d0", 0.0, Held(running=2))
    begun = known.mark("d0", 1.0)
    assert known.since(begun, 1.0) is None, "no time passed"
    assert known.since(begun, 2.0) == (2.0, 0.0)
    for number in range(WORKERS_MAX):
        known.changed(f"w{number}", 1.5, NOTHING)
    assert known.since(begun, 2.0) is None
    known.changed("d0", 2.0, Held(running=1))
    assert known.since(begun, 2.5) is None, "what came before it was forgotten is not known"


def test_gaps_among_more_than_were_foreseen_say_nothing_of_costs():
    """A gap of 10 ms with nine others is what costs of 1 ms per request say, however few were foreseen."""
    cost = StepCost(base_s=0.0, prefill_token_s=1e-3, prefill_pair_s=0.0, decode_row_s=1e-3, decode_context_s=0.0)
    workers = worker("p0", P, step_cost=cost), worker("d0", D, step_cost=cost)
    here = Situation(view(*workers), frozenset(("p0", "d0")), Claims())
    chosen = forecast(here, Need(100, output_tokens=50), PAIR)
    assert chosen is not None
    facts = Facts(10.0, first_token_at=10.1, second_token_at=10.11, last_token_at=10.21, num_tokens=12)
    facts.prefill = AttemptTiming(queue_s=0.0, prefill_s=0.1)
    foreseen, seen = Calibration(), Calibration()
    for _ in range(OUTCOMES_MIN):
        foreseen.observe(chosen, 0.0, facts)
        seen.observe(chosen, 0.0, facts, here.decode.standard_gaps(0, 10.0, 0.0))
    assert foreseen.of("d0").gap_s == pytest.approx(10e-3)
    assert seen.of("d0").gap_s == pytest.approx(1e-3)
