"""What routers were asked for, forecast, and how many workers that takes."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.autoscale import Autoscaler, Bounds, Grow, Retire
from cluster.demand import DemandForecast, DemandPlanner, Expected, Terms, lognormal, workers_for, workload_of
from cluster.planner_model import Layout
from cluster.planner_offers import Offer, Workload
from cluster.scaling import retire_s, terms_of
from core.blocks import KvLayout
from core.config import Config
from core.cost_model import CostModel, Fit, LinkCost, StepCost
from core.inventory import BlockCounts
from core.report import Demand, WorkerReport, WorkerState
from core.request import Slo, WorkerRole

P, D, C = WorkerRole.PREFILL, WorkerRole.DECODE, WorkerRole.COLOCATED
COST = StepCost(base_s=0.005, prefill_token_s=2e-4, prefill_pair_s=0.0, decode_row_s=1e-3, decode_context_s=0.0)
"""A prompt of 1,000 tokens takes 0.2 s, so a worker computes 5 of them a second and bears less; a row adds 1 ms."""
LAYOUT = KvLayout(bytes(16), "float32", 1, 1, 8, 16)
SLO = Slo(ttft_s=1.0, tbt_s=0.05)
TERMS = Terms(SLO, 2048, 8)


def router(demand: Demand, name: str = "router-0", epoch: int = 1) -> WorkerReport:
    return WorkerReport(name, WorkerRole.ROUTER, epoch, state=WorkerState.READY, demand=demand)


def worker(role: WorkerRole, number: int = 0, cost: StepCost = COST, samples: int = 100) -> WorkerReport:
    counts = BlockCounts(10_000, 10_000, 0, 0)
    fit = Fit(cost, samples, 0.0, 0.0)
    return WorkerReport(f"{role.value}-{number}", role, 1, state=WorkerState.READY, blocks=counts, step_cost=fit, layout=LAYOUT)


class Asking:
    """A router that is asked so many times a second for prompts and answers of such lengths."""

    def __init__(self, prompt: int = 1000, answer: int = 100, cached: float = 0.0) -> None:
        self.demand = Demand()
        self.prompt, self.answer, self.cached = prompt, answer, cached

    def second(self, requests: int) -> WorkerReport:
        was, prompt, answer = self.demand, self.prompt, self.answer
        self.demand = Demand(
            was.requests + requests,
            was.answered + requests,
            was.prompt_tokens + requests * prompt,
            was.prompt_squares + requests * prompt**2,
            was.cached_tokens + int(requests * prompt * self.cached),
            was.answer_tokens + requests * answer,
            was.answer_squares + requests * answer**2,
        )
        return router(self.demand)


def forecast_of(asking: Asking, rates: Sequence[int]) -> Expected:
    forecast = DemandForecast()
    for second, rate in enumerate(rates):
        forecast.observe([asking.second(rate)], float(second))
    found = forecast.expected(15.0)
    assert found is not None
    return found


def test_rate_and_lengths_are_forecast() -> None:
    steady = forecast_of(Asking(cached=0.25), [4] * 120)
    assert steady.rate_rps == pytest.approx(4.0, rel=0.1)
    assert (steady.prompt_tokens, steady.answer_tokens) == pytest.approx((1000, 100))
    assert (steady.prompt_cv, steady.answer_cv) == pytest.approx((0, 0), abs=1e-6)
    assert steady.cached == pytest.approx(0.25)
    rising = forecast_of(Asking(), [n // 10 for n in range(120)])
    assert rising.rate_rps > 11.0, "ahead of now"


def test_lengths_that_change_are_followed() -> None:
    asking, forecast = Asking(), DemandForecast()
    for second in range(200):
        asking.prompt = 1000 if second < 100 else 3000
        forecast.observe([asking.second(3)], float(second))
    found = forecast.expected(15.0)
    assert found is not None
    assert 2900 < found.prompt_tokens <= 3100


def test_nothing_is_expected_before_anything_was_answered_and_what_was_before_us_is_not_counted() -> None:
    forecast = DemandForecast()
    old = Demand(10_000, 10_000, 10**7, 10.0**10, 0, 10**6, 10.0**8)
    for second in range(10):
        forecast.observe([router(old)], float(second))
    assert forecast.expected(15.0) is None


def test_a_replaced_router_counts_from_nothing_and_several_add_up() -> None:
    forecast, first, second = DemandForecast(), Asking(), Asking()
    for at in range(60):
        reports = [first.second(2) if at < 30 else router(first.demand), second.second(2)]
        if at == 30:
            first = Asking()
        if at >= 30:
            reports[0] = replace(first.second(2), epoch=2)
        reports[1] = replace(reports[1], worker_id="router-1")
        forecast.observe(reports, float(at))
    found = forecast.expected(1.0)
    assert found is not None
    assert found.rate_rps == pytest.approx(4.0, rel=0.15)


@given(st.floats(1, 1e5), st.floats(0, 3))
def test_lengths_have_the_mean_they_are_to_have(mean: float, cv: float) -> None:
    found = lognormal(mean, cv)
    assert found.mean() == pytest.approx(mean, rel=0.05) or (found == 1).any()
    assert (np.diff(found) >= 0).all()
    if cv < 0.7 and mean > 50:
        assert found.std() / found.mean() == pytest.approx(cv, abs=0.06)


def test_prompts_and_answers_are_not_sorted_alike() -> None:
    work = workload_of(Expected(1.0, 1000, 1.0, 100, 1.0, 0.0), computed=True)
    assert abs(np.corrcoef(work.inputs, work.outputs)[0, 1]) < 0.3


def asked(rate_rps: float, **changes: float) -> Expected:
    return Expected(rate_rps, 1000, 0.5, 100, 0.5, 0.0)._replace(**changes)


def offer() -> Offer:
    return Offer("", Layout(1, 1), CostModel(COST, LAYOUT.token_bytes), 160_000, LinkCost(0.001, 1e9), None)


@pytest.mark.parametrize("role", [P, D, C])
@pytest.mark.parametrize("change", [{}, {"prompt_tokens": 3000}, {"answer_tokens": 400}])
def test_more_requests_and_longer_ones_take_no_fewer_workers(role: WorkerRole, change: dict[str, float]) -> None:
    def wanted(rate: float, **changed: float) -> int:
        return workers_for(role, offer(), asked(rate, **changed), rate, replace(TERMS, most=64))

    counts = [wanted(rate, **change) for rate in (1.0, 4.0, 16.0, 64.0)]
    assert counts == sorted(counts)
    assert counts[-1] > counts[0]
    assert wanted(16.0, **change) >= wanted(16.0)


def test_each_pool_is_planned_for_what_it_does() -> None:
    prompts, answers = asked(10.0), asked(10.0, answer_tokens=1000)
    assert workers_for(P, offer(), prompts, 10.0, TERMS) == workers_for(P, offer(), answers, 10.0, TERMS) == 3
    assert workers_for(D, offer(), answers, 10.0, TERMS) > workers_for(D, offer(), prompts, 10.0, TERMS)
    half = workers_for(P, offer(), asked(10.0, cached=0.6), 10.0, TERMS)
    assert half < 3, "what is cached is not computed"


def test_a_limit_that_no_worker_meets_asks_for_none() -> None:
    assert workers_for(P, offer(), asked(1.0, prompt_tokens=50_000), 1.0, TERMS) == 0


@given(st.floats(0.01, 1e3), st.floats(1, 1e5), st.floats(1, 1e4), st.floats(0, 2), st.sampled_from([P, D, C]))
def test_plans_stay_within_what_may_be_had(rate: float, prompt: float, answer: float, cv: float, role: WorkerRole) -> None:
    expected = Expected(rate, prompt, cv, answer, cv, 0.5)
    assert 0 <= workers_for(role, offer(), expected, rate, TERMS) <= TERMS.most


class Cluster:
    """Workers whose own load never shows, so that only what is asked for can scale them."""

    def __init__(self, counts: dict[WorkerRole, int], quiet_s: float = 30.0) -> None:
        self.desired = dict(counts)
        bounds = Bounds(dict.fromkeys(counts, 1), TERMS.most, quiet_s, start_s=5.0)
        self.scaler = Autoscaler(bounds, DemandPlanner(TERMS))
        self.asking = Asking()
        self.draw = random.Random(3)
        self.now = 0.0

    def run(self, seconds: int, rate: float) -> list[object]:
        found: list[object] = []
        for _ in range(seconds):
            self.now += 1.0
            requests = sum(self.draw.random() < rate / 20 for _ in range(20))
            workers = [worker(role, n) for role, count in self.desired.items() for n in range(count)]
            for change in self.scaler.decide([self.asking.second(requests), *workers], self.desired, self.now):
                found.append(change)
                match change:
                    case Grow(role):
                        self.desired[role] += 1
                    case Retire(name):
                        self.desired[WorkerRole(name.rpartition("-")[0])] -= 1
        return found


def test_pools_follow_what_is_asked_for_each_on_its_own() -> None:
    cluster = Cluster({P: 1, D: 1})
    assert cluster.run(60, 1.0) == []
    grown = cluster.run(120, 12.0)
    assert isinstance(grown[0], Grow)
    assert "requests/s of 1000 + 100 tokens are expected" in str(grown[0])
    assert cluster.desired[P] >= 3
    assert cluster.desired[P] > cluster.desired[D]
    cluster.run(400, 1.0)
    assert cluster.desired == {P: 1, D: 1}


def test_a_steady_rate_makes_pools_come_and_go_hardly_at_all() -> None:
    cluster = Cluster({P: 1, D: 1})
    cluster.run(120, 8.0)
    assert len(cluster.run(900, 8.0)) <= 4, "damped"


def test_without_a_cost_or_an_answer_nothing_is_planned() -> None:
    planner, asking = DemandPlanner(TERMS), Asking()
    for second in range(30):
        nothing = planner.planned([asking.second(9), replace(worker(P), step_cost=None)], {P: 1, D: 1}, 5.0, float(second))
        assert nothing == {}
    for second in range(30, 60):
        reports = [asking.second(9), worker(P), worker(P, 1, replace(COST, prefill_token_s=1.0), samples=3)]
        found = planner.planned(reports, {P: 2, D: 1}, 5.0, float(second))
    assert found.keys() == {P}, "the one with most samples is believed; no decode worker has said anything"
    assert found[P] < TERMS.most


def test_a_retired_worker_has_time_for_all_that_anybody_may_still_want_of_it() -> None:
    config = Config.model_validate({"router": {"request_timeout_s": 100.0}, "transfer": {"lease_s": 20.0}})
    assert retire_s(config) > 100 + 20
    assert retire_s(Config()) > Config().router.request_timeout_s + Config().transfer.lease_s


def test_pools_are_planned_for_the_class_of_requests_that_name_none() -> None:
    config = Config.model_validate({"router": {"default_class": "interactive"}, "cluster": {"autoscale_max": 5}})
    assert terms_of(config) == Terms(Slo(ttft_s=1.0, tbt_s=0.1), config.engine.max_step_tokens, 5)
    assert terms_of(Config.model_validate({"router": {"default_class": "batch"}})).slo.ttft_s == 5.0


def test_a_workload_is_finite() -> None:
    work = workload_of(asked(2.0), computed=False)
    assert isinstance(work, Workload)
    assert math.isfinite(work.mean_output)
