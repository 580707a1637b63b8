"""When a router proposes that a worker changes sides, and that it does so rarely."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.report import WorkerState
from core.request import WorkerRole
from router.pressure import COOL_S, HOLD_S, SMOOTHED_OVER_S, RoleAdvisor, pressure_of
from router.situation import Situation
from router.view import Claims, ClusterView, WorkerView

P, D = WorkerRole.PREFILL, WorkerRole.DECODE
SETTLED_S = 10 * SMOOTHED_OVER_S


def worker(name: str, role: WorkerRole, *, waiting: int = 0, running: int = 0, free: float = 1.0) -> WorkerView:
    return WorkerView(
        name, role, 1, WorkerState.READY, "a:1", running=running, waiting_tokens=waiting,
        blocks_total=100, blocks_free=round(100 * free),
    )  # fmt: skip


def situation(*workers: WorkerView) -> Situation:
    view = ClusterView(1, MappingProxyType({w.worker_id: w for w in workers}))
    return Situation(view, frozenset(view.workers), Claims())


IDLE = [worker("p0", P), worker("p1", P), worker("d0", D), worker("d1", D)]
PROMPTS = [worker("p0", P, waiting=200_000), worker("p1", P, waiting=150_000), worker("d0", D, running=2), worker("d1", D)]
STREAMS = [worker("p0", P, waiting=50), worker("p1", P), worker("d0", D, running=9, free=0.0), worker("d1", D, free=0.0)]
BOTH = [
    worker("p0", P, waiting=200_000),
    worker("p1", P, waiting=200_000),
    worker("d0", D, free=0.0),
    worker("d1", D, free=0.0),
]


def after(advisor: RoleAdvisor, workers: list[WorkerView], start: float, seconds: float):
    now, proposal = start, None
    while now <= start + seconds:
        proposal = advisor.advise(situation(*workers), now)
        now += 0.5
    return proposal


def advisor() -> RoleAdvisor:
    return RoleAdvisor(ttft_s=5.0, tbt_s=0.25)


@pytest.mark.parametrize(
    ("workers", "target", "role"), [(IDLE, None, None), (PROMPTS, "d1", P), (STREAMS, "p1", D), (BOTH, None, None)]
)
def test_who_has_least_to_lose_goes_to_the_pressed_side(workers, target, role):
    proposal = after(advisor(), workers, 0.0, SETTLED_S)
    assert (proposal and proposal.target, proposal and proposal.role) == (target, role)


def test_pressures_are_what_they_say():
    assert pressure_of(situation(*IDLE), 5.0, 0.25).prefill < 0.01
    assert pressure_of(situation(*PROMPTS), 5.0, 0.25).prefill > 1.0
    assert pressure_of(situation(*STREAMS), 5.0, 0.25).decode == 1.0
    assert pressure_of(situation(), 5.0, 0.25) == (pressure_of(situation(worker("p0", P)), 5.0, 0.25))


def test_a_worker_that_names_no_memory_is_not_in_the_way_of_judging_it():
    unsaid = [replace(one, blocks_total=0, blocks_free=0) for one in IDLE]
    assert pressure_of(situation(*unsaid), 5.0, 0.25).decode == 1.0, "no room is known"
    assert pressure_of(situation(*unsaid[:3], IDLE[3]), 5.0, 0.25).decode == 0.5


@pytest.mark.parametrize(
    "workers",
    [
        [w for w in PROMPTS if w.worker_id != "d1"],  # the last decode worker stays
        [*PROMPTS[:2], worker("d0", D, free=0.55), worker("d1", D, free=0.55)],  # the other could not bear it alone
    ],
)
def test_a_side_gives_nobody_whom_it_needs(workers):
    assert after(advisor(), workers, 0.0, SETTLED_S) is None


def test_a_short_burst_moves_nobody():
    one = advisor()
    after(one, IDLE, 0.0, SETTLED_S)
    assert after(one, PROMPTS, SETTLED_S + 0.5, HOLD_S / 2) is None
    assert after(one, IDLE, SETTLED_S + HOLD_S, SETTLED_S) is None


def test_after_a_change_its_effect_is_waited_for():
    one = advisor()
    assert after(one, PROMPTS, 0.0, SETTLED_S) is not None
    changed = [*PROMPTS[:2], PROMPTS[2], worker("d1", P, waiting=200_000), worker("d2", D)]
    assert after(one, changed, SETTLED_S + 1, COOL_S - 2) is None
    assert after(one, changed, SETTLED_S + COOL_S, HOLD_S + 5) is not None


WORKERS = st.builds(
    worker,
    st.sampled_from([f"w{n}" for n in range(6)]),
    st.sampled_from(list(WorkerRole)),
    waiting=st.integers(-5, 10**7),
    running=st.integers(-5, 500),
    free=st.floats(-0.5, 1.5),
)


@given(st.lists(st.tuples(st.lists(WORKERS, max_size=6), st.floats(-1, 100)), max_size=40))
def test_whatever_is_seen_a_proposal_leaves_both_sides_somebody(story):
    one, now, last = advisor(), 0.0, None
    for workers, passed_s in story:
        now += passed_s
        seen = situation(*workers)
        proposal = one.advise(seen, now)
        if proposal is None:
            continue
        giver = seen.decode if proposal.role is P else seen.prefill
        assert proposal.target in giver.names
        assert len(giver) >= 2
        sizes = (len(seen.prefill), len(seen.decode))
        assert last is None or sizes == last[0] or now - last[1] >= COOL_S
        last = (sizes, now)
