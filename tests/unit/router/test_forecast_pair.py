"""A place that was chosen already is predicted number by number: the same numbers as in columns, to the last bit."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from test_placing import C, D, P, view, worker

from core.cost_model import StepCost
from core.request import Slo
from router.block_index import BlockIndex
from router.calibration import Calibration, Correction
from router.forecast import Split, Whole
from router.forecast_pair import forecast
from router.policy import Need, Pair
from router.ranking import Goal
from router.situation import Situation
from router.view import NO_CLAIM, Claim, Claims

SECONDS = st.sampled_from([0.0, 1e-6, 3e-4, 2e-3, 0.05])
COSTS = st.builds(StepCost, st.sampled_from([1e-3, 0.025]), SECONDS, st.sampled_from([0.0, 1e-8]), SECONDS, SECONDS)
COUNTS = st.sampled_from([0, 1, 3, 40, 255, 256, 257, 5000])
LIMITS = st.none() | st.sampled_from([1e-3, 0.05, 0.3, 2.0])
CORRECTIONS = st.builds(Correction, *([SECONDS] * 4))
KEYS = tuple(bytes([n]) * 16 for n in range(20))
ROW = np.zeros(1, np.int64)


class Known(Calibration):
    """Of which the test says what it has learned."""

    def __init__(self, corrections: dict[str, Correction]) -> None:
        super().__init__()
        self._said = corrections

    def of(self, worker: str) -> Correction:
        return self._said[worker]


@st.composite
def stories(draw):
    reported = {
        name: worker(
            name,
            role,
            waiting_tokens=draw(COUNTS),
            running=draw(COUNTS),
            context_tokens=draw(COUNTS),
            step_cost=draw(COSTS),
        )
        for name, role in (("p0", P), ("d0", D), ("c0", C))
    }
    claims, index = Claims(), BlockIndex(1000)
    for _ in range(draw(st.integers(0, 4))):
        tokens, at = draw(COUNTS), draw(st.sampled_from([0.0, 1.5]))
        where = draw(st.sampled_from([("p0", "d0"), ("d0", "d0"), (None, "d0"), ("c0", "c0")]))
        claims.swap(NO_CLAIM, Claim(where[0], tokens, where[1], tokens), at)
    for name in reported:
        index.expect(name, KEYS[: draw(st.integers(0, len(KEYS)))], 0.0)
    known = Known({name: draw(CORRECTIONS) for name in reported})
    seen_at = draw(st.sampled_from([0.0, 2.0]))
    here = Situation(view(*reported.values()), frozenset(reported), claims, index, 3.0, seen_at, known)
    keys = KEYS[: draw(st.integers(0, len(KEYS)))]
    need = Need(
        draw(st.integers(max(1, 16 * len(keys)), 16 * len(keys) + 600)),
        keys=keys,
        slo=Slo(draw(LIMITS), draw(LIMITS), draw(LIMITS)),
        output_tokens=draw(st.sampled_from([0, 1, 7, 100, 3000])),
        now=2.0,
    )
    return here, need


@settings(deadline=None, max_examples=200)
@given(stories())
def test_one_pair_is_predicted_as_in_columns(story):
    here, need = story
    goal = Goal.of(need)
    split = Split(here, here.prefill, here.decode, need, goal).best(ROW, ROW, goal)[0]
    assert forecast(here, need, Pair("p0", "d0")) == split.candidate()
    for name, pool in (("d0", here.decode), ("c0", here.whole)):
        whole = Whole(here, pool, need, goal).best(ROW, goal)[0]
        assert forecast(here, need, Pair(None, name)) == whole.candidate()


def test_in_larger_pools_only_the_two_count():
    """The time until prompts are there is that of the chosen worker, not that of the quickest."""
    cost = StepCost(1e-3, 1e-4, 0.0, 1e-3, 1e-6)
    workers = [
        worker(f"{role.value}{n}", role, step_cost=cost, running=3, context_tokens=900) for role in (P, D) for n in range(3)
    ]
    claims = Claims()
    claims.swap(NO_CLAIM, Claim("prefill2", 4000, "decode1", 4000))
    here = Situation(view(*workers), frozenset(one.worker_id for one in workers), claims)
    need = Need(500, output_tokens=50)
    busy, idle = (forecast(here, need, Pair(name, "decode1")) for name in ("prefill2", "prefill0"))
    assert busy is not None
    assert idle is not None
    assert busy.queue_s > 0 == idle.queue_s
    assert busy.step_s < idle.step_s, "while it waits, who runs there ends"


def test_workers_that_nobody_knows_are_not_predicted():
    here = Situation(view(worker("d0", D)), frozenset({"d0"}), Claims())
    assert forecast(here, Need(10), Pair("p0", "d0")) is None
    assert forecast(here, Need(10), Pair(None, "gone")) is None
