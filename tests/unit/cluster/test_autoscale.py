"""Forecasts and what a controller makes of them: growing, retiring, flipping."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.autoscale import Autoscaler, Bounds, Change, Flip, Grow, Retire
from cluster.forecast import Forecast
from cluster.ray_launcher import bundles_of
from core.inventory import BlockCounts
from core.report import WorkerReport, WorkerState
from core.request import WorkerRole

P, D, C = WorkerRole.PREFILL, WorkerRole.DECODE, WorkerRole.COLOCATED


def test_a_steady_load_is_forecast_as_it_is_and_a_rising_one_ahead_of_it() -> None:
    steady, rising = Forecast(), Forecast()
    for second in range(300):
        steady.observe(5.0, float(second))
        rising.observe(0.1 * second, float(second))
    assert steady.ahead(15.0) == steady.upper(15.0) == pytest.approx(5.0)
    assert 30.0 < rising.ahead(15.0) < 0.1 * 314 + 1, "ahead of now, and no further than the line"
    assert rising.ahead(1e9) == pytest.approx(rising.level + 60 * rising.trend_per_s), "a trend dies out"


def test_head_room_is_what_forecasts_missed_by() -> None:
    jumpy = Forecast()
    for second in range(200):
        jumpy.observe(8.0 if second % 5 == 0 else 2.0, float(second))
    assert jumpy.upper(1.0) > 6.0 > jumpy.ahead(1.0)


@given(st.lists(st.tuples(st.floats(0, 1e4), st.floats(0, 60)), max_size=40), st.floats(0, 1e4))
def test_a_forecast_is_finite_never_negative_and_head_room_never_lowers_it(
    samples: Sequence[tuple[float, float]], horizon_s: float
) -> None:
    forecast, now = Forecast(), 0.0
    for value, gap in samples:
        now += gap
        forecast.observe(value, now)
    assert 0 <= forecast.ahead(horizon_s) <= forecast.upper(horizon_s) < math.inf


def report(worker_id: str, role: WorkerRole, waiting: int = 0, active: int = 0, leases: int = 0) -> WorkerReport:
    counts = BlockCounts(100, 100 - active, 0, active)
    state = WorkerState.READY
    return WorkerReport(worker_id, role, 1, state=state, waiting=waiting, blocks=counts, leases_open=leases)


class Story:
    """A scaler, and a cluster that does at once what it says."""

    def __init__(self, counts: Mapping[WorkerRole, int], most: int = 4, quiet_s: float = 30.0) -> None:
        self.scaler = Autoscaler(Bounds(dict.fromkeys(counts, 1), most, quiet_s, start_s=5.0))
        self.desired = dict(counts)
        self.workers = {f"{role.value}-{n}": role for role, count in counts.items() for n in range(count)}
        self.now = 0.0

    def run(self, seconds: float, waiting: int = 0, active: int = 0, leases: Mapping[str, int] | None = None) -> list[Change]:
        """`waiting` prompts on every prefill and colocated worker, `active` blocks on every decode worker."""
        found = []
        for _ in range(round(seconds * 2)):
            self.now += 0.5
            reports = [
                report(name, role, waiting if role is not D else 0, active if role is not P else 0, (leases or {}).get(name, 0))
                for name, role in self.workers.items()
            ]
            for change in self.scaler.decide(reports, self.desired, self.now):
                found.append(change)
                self.carry_out(change)
        return found

    def carry_out(self, change: Change) -> None:
        match change:
            case Grow(role):
                self.desired[role] += 1
                self.workers[f"{role.value}-{len(self.workers)}"] = role
            case Retire(name):
                self.desired[self.workers.pop(name)] -= 1
            case Flip(name, role):
                self.desired[self.workers[name]] -= 1
                self.desired[role] += 1
                self.workers[name] = role


def test_a_pressed_pool_grows_up_to_its_bound_and_shrinks_again_in_quiet() -> None:
    story = Story({C: 1})
    changes = story.run(20.0, waiting=20)
    assert {type(change) for change in changes} == {Grow}
    assert story.desired[C] == 4
    assert story.run(20.0) == [], "quiet has not lasted"
    assert [type(change) for change in story.run(400.0)] == [Retire] * 3
    assert story.desired[C] == 1


def test_a_blip_changes_nothing() -> None:
    story = Story({C: 2})
    story.run(60.0, active=100)
    before = dict(story.desired)
    assert story.run(0.5, waiting=1, active=100) == []
    assert story.desired == before


def test_prefill_and_decode_are_scaled_apart() -> None:
    story = Story({P: 1, D: 1})
    story.run(20.0, waiting=20, active=30)
    assert story.desired[P] > 1
    assert story.desired[D] == 1
    other = Story({P: 1, D: 1})
    other.run(20.0, active=100)
    assert other.desired[D] > 1
    assert other.desired[P] == 1


def test_a_worker_that_one_pool_can_spare_goes_to_the_other() -> None:
    story = Story({P: 3, D: 1})
    changes = story.run(15.0, active=100)
    assert any(isinstance(change, Flip) and change.role is D for change in changes)
    assert story.desired[P] >= 1
    assert len(story.workers) == sum(story.desired.values())


def test_who_holds_what_others_still_read_leaves_last() -> None:
    story = Story({P: 3, D: 1}, quiet_s=5.0)
    changes = story.run(30.0, active=50, leases={"prefill-0": 2, "prefill-2": 1})
    retired = [change.worker_id for change in changes if isinstance(change, Retire)]
    assert retired == ["prefill-1", "prefill-2"]


def test_nothing_happens_to_a_pool_while_a_change_is_under_way() -> None:
    scaler = Autoscaler(Bounds({C: 1}, 8, 30.0, 5.0))
    found = [
        change
        for second in range(60)
        for change in scaler.decide([report("colocated-0", C, waiting=50)], {C: 2}, float(second))
    ]
    assert found == []


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 100)), min_size=5, max_size=60), st.integers(1, 5))
def test_pools_stay_within_their_bounds(loads: Sequence[tuple[int, int]], most: int) -> None:
    story = Story({P: 1, D: 1}, most, quiet_s=2.0)
    for waiting, active in loads:
        story.run(3.0, waiting, active)
        assert all(1 <= count <= most for count in story.desired.values())


def test_ray_is_asked_for_a_bundle_per_worker() -> None:
    asked = bundles_of({P: 2, D: 1}, {"tandem_prefill": 8.0, "CPU": 4.0})
    assert asked == [{"CPU": 0.01, "tandem_prefill": 0.001}] * 2 + [{"CPU": 0.01}]
