"""The linear model of a step: exact on what is linear, bounded on what is not, and honest about its error."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.cost_fit import fit_link, fit_steps, heldout_errors
from core.cost_model import CostModel, Drift, LinkCost, StepCost, StepShape, pairs
from core.errors import ConfigError

COST = StepCost(base_s=0.004, prefill_token_s=2e-4, prefill_pair_s=3e-8, decode_row_s=5e-4, decode_context_s=1e-6)


def shapes(rng: random.Random, count: int) -> list[StepShape]:
    made = []
    for _ in range(count):
        rows = [(1, rng.randrange(1, 2000)) for _ in range(rng.randrange(0, 16))]
        if rng.random() < 0.6 or not rows:
            rows.append((rng.randrange(2, 256), rng.randrange(0, 2000)))
        made.append(StepShape.of(rows))
    return made


def test_a_shape_counts_what_each_row_looks_at():
    assert StepShape.of([(3, 0), (1, 7), (2, 10)]) == StepShape(5, 6 + 20 + 3, 1, 8)


def test_one_new_token_without_context_is_a_prompt():
    assert StepShape.of([(1, 0)]) == StepShape(prefill_tokens=1, prefill_pairs=1)


@pytest.mark.parametrize(("new", "context"), [(1, 0), (4, 0), (3, 10), (0, 5)])
def test_pairs_add_up(new: int, context: int):
    assert pairs(new, context) == sum(context + i for i in range(1, new + 1))


def test_chunks_cost_their_base_and_nothing_else():
    whole, chunked = COST.prefill_s(1000), COST.prefill_s(1000, chunk_tokens=256)
    assert chunked - whole == pytest.approx(3 * COST.base_s)
    assert COST.prefill_s(0, 500) == 0.0


def test_a_prompt_in_chunks_costs_what_its_steps_cost():
    steps = [(256, 0), (256, 256), (88, 512)]
    assert COST.prefill_s(600, chunk_tokens=256) == pytest.approx(sum(COST.step_s(StepShape.of([row])) for row in steps))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), values=st.lists(st.floats(1e-7, 1e-2), min_size=5, max_size=5))
def test_what_is_linear_is_found_again(seed, values):
    truth = StepCost(*values)
    samples = [(shape, truth.step_s(shape)) for shape in shapes(random.Random(seed), 60)]
    assert fit_steps(samples).p90_error < 1e-3


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_no_coefficient_is_negative_however_noisy(seed):
    rng = random.Random(seed)
    samples = [(shape, rng.uniform(0.001, 0.1)) for shape in shapes(rng, 30)]
    fit = fit_steps(samples)
    assert all(value >= 0 for value in (fit.cost.base_s, fit.cost.prefill_token_s, fit.cost.decode_row_s))
    assert fit.cost.step_s(StepShape(100, 5000, 3, 900)) >= 0


def test_noise_shows_in_the_reported_error():
    rng = random.Random(1)
    samples = [(shape, COST.step_s(shape) * rng.uniform(0.8, 1.2)) for shape in shapes(rng, 300)]
    assert 0.05 < fit_steps(samples).median_error < 0.15


def test_heldout_errors_tell_a_bent_machine_from_a_straight_one():
    sizes = [shape for shape in shapes(random.Random(2), 60) if shape.prefill_tokens > 1]
    straight = [(shape, COST.step_s(shape)) for shape in sizes]
    bent = [(shape, COST.step_s(shape) * (1 if shape.prefill_tokens < 128 else 3)) for shape in sizes]
    assert max(heldout_errors(straight)) < 1e-3 < 0.1 < heldout_errors(bent)[0]
    with pytest.raises(ValueError, match="at least 5"):
        heldout_errors(straight[:6], folds=3)


def test_a_link_is_found_again():
    truth = LinkCost(1e-4, 4e9)
    found = fit_link([(size, truth.transfer_s(size)) for size in (2**16, 2**20, 2**24)])
    assert (found.latency_s, found.bytes_per_s) == (pytest.approx(1e-4), pytest.approx(4e9))


@pytest.mark.parametrize("samples", [[], [(1, 1.0)], [(1, 0.0), (2, 1.0)], [(100, 1.0), (200, 1.0), (300, 0.5)]])
def test_transfers_that_say_nothing_of_a_rate_are_refused(samples):
    with pytest.raises(ValueError, match=r"fitted|larger"):
        fit_link(samples)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_times_that_cannot_be_are_refused(seconds: float):
    with pytest.raises(ValueError, match="took no time"):
        fit_steps([(StepShape(1, 1), seconds)] * 6)


def test_too_few_steps_are_refused():
    with pytest.raises(ValueError, match="at least 5"):
        fit_steps([(StepShape(1, 1), 1.0)] * 4)


def test_drift_follows_a_slower_machine_and_not_one_slow_step():
    drift, shape = Drift(COST), StepShape(100, 5050)
    assert (drift.cost, drift.factor) == (COST, 1.0)
    for _ in range(20):
        drift.observe(shape, COST.step_s(shape))
    drift.observe(shape, 50.0)
    assert drift.cost.step_s(shape) == pytest.approx(COST.step_s(shape))
    for _ in range(200):
        drift.observe(shape, 1.5 * COST.step_s(shape))
    assert drift.cost.step_s(shape) == pytest.approx(1.5 * COST.step_s(shape))
    for nonsense in (0.0, -1.0, float("nan")):
        drift.observe(shape, nonsense)
    assert drift.cost.step_s(shape) == pytest.approx(1.5 * COST.step_s(shape))


def test_a_model_survives_its_file():
    model = CostModel(COST, 8192, {"shm": LinkCost(1e-4, 8e9)}, "abc", "here", 300, 0.02, 0.1)
    assert CostModel.from_json(json.loads(json.dumps(model.to_json())), "f.json") == model


GOOD = CostModel(COST, 8192, {"shm": LinkCost(1e-4, 8e9)}).to_json()
BAD = {
    "nothing": None,
    "a list": [],
    "another format": {**GOOD, "format": "x"},
    "no steps": {key: value for key, value in GOOD.items() if key != "steps"},
    "a negative coefficient": {**GOOD, "steps": {**GOOD["steps"], "base_s": -1}},
    "a text for a number": {**GOOD, "steps": {**GOOD["steps"], "base_s": "1"}},
    "an unknown coefficient": {**GOOD, "steps": {**GOOD["steps"], "other_s": 1}},
    "an unknown key": {**GOOD, "more": 1},
    "a link that stands still": {**GOOD, "links": {"shm": {"latency_s": 0, "bytes_per_s": 0}}},
}


@pytest.mark.parametrize("tree", BAD.values(), ids=BAD.keys())
def test_what_is_no_cost_model_is_refused_by_name(tree: object):
    with pytest.raises(ConfigError, match=r"profile\.json is no cost model"):
        CostModel.from_json(tree, "profile.json")
