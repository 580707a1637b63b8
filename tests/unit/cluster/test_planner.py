"""The planner's own search: sizes, markets, colocated or split, what binds, and what it says when nothing fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.closed_forms import single_ttft_s
from cluster.planner import Plan, Settings, _goodput_at, interval_of, plan
from cluster.planner_analytic import Analytic
from cluster.planner_model import Arriving, Layout
from cluster.planner_nearest import nearest
from cluster.planner_offers import Attainment, Market, Offer, Pool, Pools, Terms, Workload, gpus_of, shortage, usd_per_hour_of
from cluster.planner_sizes import candidates
from core.cost_model import CostModel, LinkCost, StepCost
from core.errors import ConfigError
from core.request import Slo, WorkerRole

P, D, C = WorkerRole.PREFILL, WorkerRole.DECODE, WorkerRole.COLOCATED
COST = CostModel(StepCost(0.02, 60e-6, 0.0, 100e-6, 1e-7), kv_token_bytes=300_000)


def offer(gpu: str = "big", factor: float = 1.0, usd: float = 4.0, **changes: object) -> Offer:
    cost = replace(COST, steps=COST.steps.scaled(factor))
    made = Offer(gpu, Layout(1, 1), cost, 500_000, LinkCost(1e-4, 25e9), Terms(usd))
    return replace(made, **changes)  # type: ignore[arg-type]


def workload(rate_rps: float = 20.0, prompt: int = 1000, answer: int = 100, spread: float = 0.5) -> Workload:
    draw = np.random.default_rng(5)
    at = np.cumsum(draw.exponential(1 / rate_rps, 600))
    prompts, answers = (np.maximum(1, mean * np.exp(spread * draw.normal(size=600))).astype(int) for mean in (prompt, answer))
    return Workload.of([Arriving(*one) for one in zip(at.tolist(), prompts.tolist(), answers.tolist(), strict=True)])


LOOSE, TIGHT = Slo(ttft_s=2.0, tbt_s=0.2), Slo(ttft_s=0.6, tbt_s=0.045)


def planned(offers: Sequence[Offer], slo: Slo = LOOSE, work: Workload | None = None, **changes: object) -> Plan:
    found = plan(work or workload(), offers, slo, None, replace(Settings(), **changes))  # type: ignore[arg-type]
    assert found is not None
    return found


def test_more_replicas_never_make_it_worse_and_more_load_never_better() -> None:
    work = workload()
    judge = Analytic(work, TIGHT)
    one = offer()
    for roles in ((P, D), (C,)):
        shares = [judge(tuple(Pool(role, one, n) for role in roles), 20.0).joint for n in (1, 2, 4, 8, 32)]
        assert shares == sorted(shares)
        rates = [judge(tuple(Pool(role, one, 8) for role in roles), rate).joint for rate in (1.0, 10.0, 40.0, 200.0)]
        assert rates == sorted(rates, reverse=True)
        assert rates[0] > 0.9 > 0.1 > rates[-1]


def test_one_length_and_poisson_arrivals_wait_as_in_the_closed_form() -> None:
    """Half the prompts wait longer than the median of the tail that has the closed form's mean."""
    at = np.cumsum(np.random.default_rng(1).exponential(0.1, 4000)).tolist()
    work = Workload.of([Arriving(when, 1000, 1) for when in at])
    service = 0.02 + 0.06
    mean = single_ttft_s(10.0, service) - service
    ttft = Analytic(work, Slo(ttft_s=service + mean))([Pool(P, offer(), 1), Pool(D, offer(), 50)], 10.0).ttft
    busy = 10.0 * service
    assert ttft == pytest.approx(1 - busy * np.exp(-busy), abs=0.03)


def test_the_demand_is_served_and_the_goodput_is_at_least_as_high() -> None:
    found = planned([offer()])
    assert found.meets
    assert found.attained.joint >= 0.9
    assert found.goodput_rps.mean >= 20.0 * 0.95
    assert (found.gpus, found.usd_per_hour) == (gpus_of(found.pools), usd_per_hour_of(found.pools))
    assert found.per_usd is not None
    assert found.per_usd.mean == pytest.approx(found.goodput_rps.mean * 3600 / found.usd_per_hour)
    assert found.binding in ("ttft", "tbt", "memory")


def test_a_dearer_gpu_is_bought_where_it_is_worth_it_and_only_there() -> None:
    cheap, dear = offer("cheap", factor=2.5, usd=2.0), offer("dear", usd=4.0)
    assert {pool.offer.gpu for pool in planned([cheap, dear], TIGHT).pools} == {"dear"}, "2.5 x 20 ms are over 45 ms"
    mixed = planned([cheap, dear], Slo(ttft_s=0.4, tbt_s=0.3), workload(5.0))
    assert mixed.usd_per_hour <= planned([dear], Slo(ttft_s=0.4, tbt_s=0.3), workload(5.0)).usd_per_hour


def test_colocated_wins_with_loose_gaps_and_split_with_tight_ones() -> None:
    assert {pool.role for pool in planned([offer()], Slo(ttft_s=2.0, tbt_s=1.0)).pools} == {C}
    assert {pool.role for pool in planned([offer()], TIGHT).pools} == {P, D}


def test_spot_is_bought_where_it_stays_long_enough() -> None:
    spot = Terms(1.2, interruptions_per_hour=0.05, notice_s=30, away_s=120)
    calm = planned([offer(spot=spot)], work=workload(100.0))
    assert any(pool.market is Market.SPOT for pool in calm.pools)
    assert calm.usd_per_hour < planned([offer()], work=workload(100.0)).usd_per_hour
    rough = replace(spot, interruptions_per_hour=60.0, away_s=600.0)
    assert all(pool.market is Market.ON_DEMAND for pool in planned([offer(spot=rough)], work=workload(20.0)).pools)


def test_too_few_gpus_serve_what_they_can_and_say_which_is_missing() -> None:
    found = planned([offer(on_demand=Terms(4.0, gpus_max=2))], work=workload(500.0))
    assert not found.meets
    assert "big (on demand): 2 GPUs can be had" in found.binding
    assert found.gpus <= 2
    assert 0 < found.goodput_rps.mean < 500


def test_a_demand_far_beyond_all_machines_still_names_what_there_is_too_little_of() -> None:
    work = replace(workload(20.0), rate_rps=1e9)
    found = planned([offer(on_demand=Terms(4.0, gpus_max=2))], work=work)
    assert not found.meets
    assert "big (on demand): 2 GPUs can be had" in found.binding
    assert found.goodput_rps.mean > 1


def test_a_limit_below_one_step_has_no_plan_and_a_nearest_one() -> None:
    work, impossible = workload(), Slo(ttft_s=2.0, tbt_s=0.015)
    assert plan(work, [offer()], impossible, None, Settings()) is None
    near = nearest(work, [offer()], impossible, 0.9, 20.0)
    assert near.binding == "tbt"
    assert near.slo.ttft_s == 2.0
    assert near.slo.tbt_s is not None
    assert 0.02 < near.slo.tbt_s < 0.04, "a step takes 20 ms"
    assert plan(work, [offer()], near.slo, None, Settings()) is not None
    assert nearest(work, [offer()], Slo(ttft_s=0.01, tbt_s=0.2), 0.9, 20.0).binding == "ttft"
    assert nearest(work, [offer()], Slo(ttft_s=0.01, tbt_s=0.01), 0.9, 20.0).binding == "ttft and tbt"
    assert nearest(work, [offer(kv_tokens=50)], LOOSE, 0.9, 20.0).binding == "memory"


def test_a_stricter_judge_gets_its_replicas_and_a_kinder_one_gives_some_back() -> None:
    work = workload()
    quick = Analytic(work, LOOSE)

    def doubled(pools: Pools, rate_rps: float, seed: int) -> Attainment:
        return quick(pools, 1.5 * rate_rps)

    def halved(pools: Pools, rate_rps: float, seed: int) -> Attainment:
        return quick(pools, 0.5 * rate_rps)

    usual, strict, kind = (plan(work, [offer()], LOOSE, judge, Settings(mends=12)) for judge in (None, doubled, halved))
    assert usual is not None and strict is not None and kind is not None  # noqa: PT018
    assert kind.gpus < usual.gpus < strict.gpus
    assert strict.meets


def test_seeds_that_disagree_widen_the_interval() -> None:
    work = workload()
    quick = Analytic(work, LOOSE)

    def moody(pools: Pools, rate_rps: float, seed: int) -> Attainment:
        return quick(pools, rate_rps * (1 + 0.1 * seed))

    found = plan(work, [offer()], LOOSE, moody, Settings())
    assert found is not None
    assert found.goodput_rps.low < found.goodput_rps.mean < found.goodput_rps.high
    assert interval_of([5.0]) == (interval_of([5.0, 5.0]))
    assert interval_of([1.0, 2.0, 3.0]).high == pytest.approx(2 + 4.303 / 3**0.5)


def test_few_simulations_are_asked_for_none_twice_and_what_is_left_is_known() -> None:
    work = workload()
    quick = Analytic(work, LOOSE)
    asked: list[tuple[Pools, float, int]] = []
    left: list[int] = []

    def kinder(pools: Pools, rate_rps: float, seed: int) -> Attainment:
        asked.append((pools, rate_rps, seed))
        return quick(pools, (0.4 + 0.01 * seed) * rate_rps)

    kinds = [offer(), offer("small", 2.0, 2.5), offer("spot", on_demand=Terms(4.0), spot=Terms(2.0, None, 0.1, 30.0, 180.0))]
    found = plan(work, kinds, LOOSE, kinder, Settings(), lambda what, more: left.append(more))
    assert found is not None
    assert found.meets
    assert len(set(asked)) == len(asked) == len(left), "each is told of, and none is asked twice"
    assert len(asked) <= 30
    off = [abs(more - (len(asked) - number)) for number, more in enumerate(left)]
    assert max(off) <= 12, off
    assert off[-1] <= 3, off
    best = (float("inf"), 0)
    for pools, rate_rps, seed in asked:
        if rate_rps == work.rate_rps and seed == 0:
            price = usd_per_hour_of(pools), gpus_of(pools)
            assert price < best, "what is no cheaper than pools that serve cannot win"
            best = price if quick(pools, 0.4 * rate_rps).joint >= 0.9 else best


def test_what_is_looked_at_closer_is_not_the_same_twice() -> None:
    work = workload(20.0)
    kinds = [offer(spot=Terms(2.0)), offer("small", 2.0, 2.5, spot=Terms(1.2))]
    found = candidates(work, kinds, LOOSE, Analytic(work, LOOSE), 20.0, 0.9, 6)
    assert len(found) == len(set(found)) == 6


@given(st.integers(-60, 50), st.floats(0.02, 15.0))
def test_where_the_search_of_goodput_begins_changes_nothing_of_what_it_finds(begin: int, factor: float) -> None:
    def judge(pools: Pools, rate_rps: float, seed: int) -> Attainment:
        share = 1.0 if rate_rps <= factor * 20.0 else 0.5
        return Attainment(share, share, share, share)

    at = _goodput_at((), 20.0, begin, judge, Settings(), 0)
    assert at is not None
    assert 1.05**at <= factor < 1.05 ** (at + 1) or at == 57


@given(st.floats(0.5, 200.0), st.sampled_from([LOOSE, TIGHT]), st.sampled_from([None, 4, 40]))
@settings(max_examples=15, deadline=None)
def test_what_is_planned_can_be_had_and_meets_what_it_says(rate_rps: float, slo: Slo, gpus_max: int | None) -> None:
    found = plan(workload(rate_rps), [offer(on_demand=Terms(4.0, gpus_max))], slo, None, Settings())
    if found is not None:
        assert not shortage(found.pools)
        assert not found.meets or found.attained.joint >= 0.9
        assert 0 < found.goodput_rps.mean < 20 * max(rate_rps, 1)


parts = st.sampled_from([0.0, 1e-9, 1e-4, 0.01])


@settings(max_examples=100, deadline=None)
@given(base_s=parts, prompt_s=parts, pair_s=parts, row_s=parts, context_s=parts, rate_rps=st.sampled_from([0.1, 5.0, 100.0]))
def test_whatever_steps_are_learned_to_cost_can_be_judged(
    base_s: float, prompt_s: float, pair_s: float, row_s: float, context_s: float, rate_rps: float
) -> None:
    """Of few steps it may be learned that one of their parts, or all of them, cost nothing."""
    plain = offer()
    learned = replace(plain, cost=replace(plain.cost, steps=StepCost(base_s, prompt_s, pair_s, row_s, context_s)))
    judge = Analytic(workload(), Slo(ttft_s=1.0, tbt_s=0.1))
    pair = (Pool(WorkerRole.PREFILL, learned, 1), Pool(WorkerRole.DECODE, learned, 1))
    for pools in (pair, (Pool(WorkerRole.COLOCATED, learned, 1),), (*pair, Pool(WorkerRole.COLOCATED, learned, 2))):
        assert all(0 <= part <= 1 + 1e-9 for part in judge(pools, rate_rps))


def test_a_trace_of_nothing_is_refused() -> None:
    for requests in ([], [Arriving(0.0, 1, 1)], [Arriving(1.0, 1, 1)] * 3):
        with pytest.raises(ConfigError, match="two requests"):
            Workload.of(requests)
