"""Splitwise: its simulator's stored results on its own profile, its machines and pools, its provisioning."""

from __future__ import annotations

import csv
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.planner_model import Arriving
from cluster.planner_splitwise import (
    DESIGNS,
    SLOWDOWNS,
    Evaluate,
    Objective,
    Sizes,
    Slowdowns,
    broken,
    least,
    most_throughput,
    splits,
)
from cluster.splitwise_machine import PREEMPTIONS_MAX, Machine, Task
from cluster.splitwise_play import Played, Pool, play
from core.cost_model import StepShape
from core.gpu_profile import read_profile_table
from core.profile_table import ProfileTable

DATA = Path(__file__).parents[1] / "data/splitwise"
CAPACITY = 89_000


def table(hardware: str) -> ProfileTable:
    wanted = {"model": "bloom-176b", "hardware": hardware, "tensor_parallel": "8"}
    return read_profile_table(str(DATA / "perf_model_bloom.csv"), wanted)


A100, H100 = table("a100-80gb"), table("h100-80gb")
SHAPES = {
    "baseline-h100": [Pool("h100", "mixed", 1, H100.step_s, CAPACITY)],
    "splitwise-ha": [
        Pool("h100", "prompt", 1, H100.step_s, CAPACITY),
        Pool("a100", "token", 1, A100.step_s, CAPACITY),
    ],
}


def rows(name: str) -> list[dict[str, str]]:
    with (DATA / name).open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("config", SHAPES)
def test_the_three_requests_of_its_example_exactly(config: str) -> None:
    trace = [
        Arriving(float(row["arrival_timestamp"]), int(row["prompt_size"]), int(row["token_size"]))
        for row in rows("test_trace.csv")
    ]
    stored = [row for row in rows("reference_results.csv") if row["config"] == config]
    assert len(stored) == len(trace) == 3
    for request, ours, theirs in zip(trace, play(trace, SHAPES[config], H100.kv_token_bytes), stored, strict=True):
        figures = {"ttft_s": ours.ttft_s, "tbt_s": ours.tbt_s(request.output_tokens), "response_s": ours.response_s}
        if config == "splitwise-ha":
            figures |= {"kv_transfer_s": ours.transfer_s, "token_phase_start_s": ours.token_start_s}
        assert {name: f"{value:.6f}" for name, value in figures.items()} == {
            name: f"{float(theirs[name]):.6f}" for name in figures
        }


def traffic(rate: float, count: int, seed: int) -> list[Arriving]:
    rng = random.Random(seed)
    now, made = 0.0, []
    for _ in range(count):
        now += rng.expovariate(rate)
        made.append(Arriving(now, rng.randint(1, 6000), rng.randint(1, 400)))
    return made


def split(prompts: int, tokens: int) -> list[Pool]:
    return [Pool("p", "prompt", prompts, H100.step_s, CAPACITY), Pool("t", "token", tokens, A100.step_s, CAPACITY)]


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**32),
    rate=st.floats(0.2, 60),
    pools=st.one_of(
        st.builds(split, st.integers(1, 4), st.integers(1, 4)),
        st.integers(1, 5).map(lambda count: [Pool("h", "mixed", count, H100.step_s, CAPACITY)]),
    ),
)
def test_everybody_is_served_and_nobody_faster_than_alone(seed: int, rate: float, pools: list[Pool]) -> None:
    requests = traffic(rate, 120, seed)
    played = play(requests, pools, H100.kv_token_bytes)
    for request, one in zip(requests, played, strict=True):
        assert one.ttft_s >= H100.prompt(request.input_tokens) - 1e-9
        decodes = request.output_tokens - 1
        assert one.response_s >= one.ttft_s + one.transfer_s + decodes * min(H100.token(1), A100.token(1)) - 1e-6


def test_the_same_requests_give_the_same_times() -> None:
    requests = traffic(20, 200, 5)
    assert play(requests, split(2, 2), 4_014_080) == play(requests, split(2, 2), 4_014_080)


def test_a_request_that_no_machine_can_hold_is_named() -> None:
    with pytest.raises(ValueError, match="request 0 needs more memory than a machine of kind p"):
        play([Arriving(0.0, CAPACITY, 10)], split(1, 1), 4_014_080)


def test_a_full_prompt_pool_borrows_token_machines() -> None:
    burst = [Arriving(0.0, 4000, 20)] * 40
    pools = [Pool("p", "prompt", 1, H100.step_s, CAPACITY), Pool("t", "token", 3, H100.step_s, CAPACITY)]
    alone = play(burst, pools, 4_014_080)
    fair_share = 40 * H100.prompt(4000)
    assert max(one.ttft_s for one in alone) < 0.5 * fair_share, "one prompt machine alone would need the fair share"


def test_whoever_was_passed_over_often_runs_before_prompts() -> None:
    def seconds(shape: StepShape) -> float:
        return 1.0

    machine = Machine(0, "h", "mixed", seconds, 10**9)
    decode = Task(0, 0.0, False, 1, 50, 50)
    assert machine.add(decode, 0.0)
    for number in range(1, 12):
        machine.queue(Task(number, float(number), True, 3000, 1, 3001))
    turns = []
    for step in range(12):
        machine.iterations = min(machine.iterations, 1)
        machine.finish()
        machine.start(float(step))
        turns.append(decode in machine.batch)
    assert turns.index(True) == PREEMPTIONS_MAX
    assert any(turns)


def holding(metric: str = "", value: float = 1.0) -> Slowdowns:
    return {name: (value, value, value) if name == metric else (1.0, 1.0, 1.0) for name in SLOWDOWNS}


@pytest.mark.parametrize(
    ("slowdowns", "said"),
    [
        (holding(), ""),
        (holding("ttft", 2.0), ""),
        (holding("tbt", 1.3), "tbt p50 1.30 > 1.25"),
        ({**holding(), "e2e": (1.0, 1.0, 5.1)}, "e2e p99 5.10 > 5"),
    ],
)
def test_all_nine_limits_count(slowdowns: Slowdowns, said: str) -> None:
    assert broken(slowdowns) == said


def test_grids_stay_within_the_budget() -> None:
    budget = 40 * 44.0
    for name in ("Splitwise-AA", "Splitwise-HA", "Splitwise-HHcap"):
        grid = splits(DESIGNS[name], budget, Objective.POWER)
        assert grid
        assert all(budget - DESIGNS[name].prompt.power < one.power <= budget + 1e-6 for one in grid)
    assert splits(DESIGNS["Baseline-A100"], budget, Objective.POWER) == [Sizes(DESIGNS["Baseline-A100"], 70, 0)]
    assert splits(DESIGNS["Baseline-A100"], 40 * 4.76, Objective.COST) == [Sizes(DESIGNS["Baseline-A100"], 86, 0)]


def needs(prompt_share: float, token_share: float, asked: list[Sizes]) -> Evaluate:
    """A cluster that keeps its limits while each pool has so many machines per request a second."""

    def evaluate(sizes: Sizes, rate: float) -> Slowdowns:
        asked.append(sizes)
        if sizes.prompt < prompt_share * rate:
            return holding("ttft", 99.0)
        short = sizes.design.token is not None and sizes.token < token_share * rate
        return holding("tbt", 99.0) if short else holding()

    return evaluate


def test_the_best_split_is_found() -> None:
    asked: list[Sizes] = []
    found = most_throughput(DESIGNS["Splitwise-HH"], 40 * 44.0, Objective.POWER, range(10, 200, 10), needs(0.25, 0.15, asked))
    assert (found.sizes.prompt, found.sizes.token, found.rate_rps) == (25, 15, 100)


@settings(deadline=None)
@given(prompt_share=st.floats(0.02, 0.5), token_share=st.floats(0.02, 0.5), name=st.sampled_from(sorted(DESIGNS)))
def test_the_least_cluster_is_the_least(prompt_share: float, token_share: float, name: str) -> None:
    design, asked, rate = DESIGNS[name], list[Sizes](), 70.0
    largest = Sizes(design, 40, 40 if design.token else 0)
    found = least(design, rate, Objective.COST, largest, needs(prompt_share, token_share, asked))
    evaluate = needs(prompt_share, token_share, [])
    all_sizes = [Sizes(design, p, t) for p in range(1, 41) for t in (range(1, 41) if design.token else (0,))]
    fitting = [sizes for sizes in all_sizes if not broken(evaluate(sizes, rate))]
    assert (found.cost if found else None) == (min(sizes.cost for sizes in fitting) if fitting else None)
    assert len(asked) <= 95, "not the whole grid"


def test_a_played_request_counts_tbt_as_its_authors_do() -> None:
    assert Played(0.5, 2.5, 0.0, 0.5).tbt_s(4) == pytest.approx(0.5)
