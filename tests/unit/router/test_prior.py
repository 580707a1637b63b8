"""What is believed of workers that have learned nothing, and what is said when the others depart from it."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.blocks import KvLayout
from core.cost_model import CostModel, LinkCost, StepCost
from core.errors import ConfigError
from core.report import WorkerState
from core.request import WorkerRole
from router.prior import DRIFT_HOLD_S, Prior
from router.view import ASSUMED_LINK, ClusterView, WorkerView

COST = StepCost(base_s=0.004, prefill_token_s=2e-4, prefill_pair_s=3e-8, decode_row_s=5e-4, decode_context_s=1e-6)
MODEL = CostModel(COST, 5120, {"shm": LinkCost(1e-5, 4e9), "tcp": LinkCost(5e-4, 1e9)}, fingerprint="ab" * 16)
LAYOUT = KvLayout(bytes.fromhex("ab" * 16), "float32", 5, 4, 32, 16)


def worker(name: str, role: WorkerRole = WorkerRole.PREFILL, cost: StepCost | None = None, running: int = 0, epoch: int = 1):
    return WorkerView(
        name, role, epoch, WorkerState.READY, "x:1", running, context_tokens=100 * running, step_cost=cost, layout=LAYOUT
    )


def view(*workers: WorkerView) -> ClusterView:
    return ClusterView(1, MappingProxyType({one.worker_id: one for one in workers}))


def test_it_counts_for_those_who_learned_nothing_and_for_nobody_else() -> None:
    learned = COST.scaled(3.0)
    seen = Prior(MODEL, "cost.json").under(view(worker("p-0"), worker("p-1", cost=learned)))
    assert [seen.workers[name].step_cost for name in ("p-0", "p-1")] == [COST, learned]


@pytest.mark.parametrize(
    ("transport", "link"),
    [("auto", MODEL.links["shm"]), ("tcp", MODEL.links["tcp"]), ("collective", ASSUMED_LINK)],
)
def test_the_link_is_the_one_that_is_configured(transport: str, link: LinkCost) -> None:
    assert Prior(MODEL, "cost.json", transport).under(view()).link == link


def test_another_model_is_refused_by_name() -> None:
    prior = Prior(MODEL, "cost.json")
    prior.check(view(worker("p-0"), replace(worker("p-1"), layout=None)))
    other = replace(worker("p-0"), layout=replace(LAYOUT, fingerprint=b"\xcd" * 16), model_name="large")
    with pytest.raises(ConfigError, match=r"cost\.json was measured on.*abab.*large \(cdcd"):
        prior.check(view(other))
    Prior(replace(MODEL, fingerprint=""), "gpu.json").check(view(other))


def watched(prior: Prior, until_s: int, *workers: WorkerView, start_s: int = 0) -> list[tuple[int, str]]:
    return [(now, line) for now in range(start_s, until_s) for line in prior.watch(float(now), view(*workers))]


def test_a_departure_is_said_once_after_a_while_and_its_end_as_well() -> None:
    prior, slow = Prior(MODEL, "cost.json"), worker("p-0", cost=COST.scaled(2.5))
    said = watched(prior, 200, slow, worker("p-1", cost=COST.scaled(1.2)), worker("p-2"))
    assert [now for now, _ in said] == [DRIFT_HOLD_S]
    assert "p-0 have taken 2.50 x what cost.json says" in said[0][1]
    assert prior.factors == {"p-0": pytest.approx(2.5), "p-1": pytest.approx(1.2)}
    back = watched(prior, 400, worker("p-0", cost=COST), start_s=200)
    assert [line for _, line in back] == ["steps of p-0 take what cost.json says again"]
    assert set(prior.factors) == {"p-0"}, "whoever is gone is not spoken of"


def test_a_short_departure_is_not_spoken_of() -> None:
    prior = Prior(MODEL, "cost.json")
    assert not watched(prior, 10, worker("p-0", cost=COST))
    assert not watched(prior, 13, worker("p-0", cost=COST.scaled(9.0)), start_s=10)
    assert not watched(prior, 300, worker("p-0", cost=COST), start_s=13)


def test_a_new_incarnation_starts_anew() -> None:
    prior = Prior(MODEL, "cost.json")
    assert len(watched(prior, 100, worker("p-0", cost=COST.scaled(0.5)))) == 1
    assert not watched(prior, 120, worker("p-0", cost=COST.scaled(0.5), epoch=2), start_s=100)
    assert len(watched(prior, 200, worker("p-0", cost=COST.scaled(0.5), epoch=2), start_s=120)) == 1


def test_an_idle_decode_worker_says_nothing_of_its_steps() -> None:
    prior, nothing = Prior(MODEL, "cost.json"), StepCost(0.0, 0.0, 0.0, 0.0, 0.0)
    assert not watched(
        prior, 100, worker("d-0", WorkerRole.DECODE, nothing), worker("d-1", WorkerRole.DECODE, nothing, running=-3)
    )
    assert not prior.factors
    watched(prior, 101, worker("d-0", WorkerRole.DECODE, COST.scaled(0.9), running=4), start_s=100)
    assert prior.factors == {"d-0": pytest.approx(0.9)}


@settings(max_examples=50, deadline=None)
@given(
    values=st.lists(st.floats(0, 1e6), min_size=5, max_size=5),
    running=st.integers(-(2**40), 2**40),
    context=st.integers(-(2**40), 2**40),
    role=st.sampled_from(list(WorkerRole)),
)
def test_no_report_makes_it_raise(values: list[float], running: int, context: int, role: WorkerRole) -> None:
    prior = Prior(MODEL, "cost.json")
    odd = replace(worker("w", role, StepCost(*values), running), context_tokens=context)
    for now in (0.0, 100.0, 50.0):
        prior.watch(now, view(odd))
        assert prior.under(view(odd)).workers["w"].step_cost is not None
