"""What a worker learns of its own steps."""

from __future__ import annotations

import random

from core.cost_model import StepCost, StepShape
from core.step_learner import KINDS_MAX, StepLearner

COST = StepCost(0.002, 1e-4, 1e-8, 3e-4, 5e-7)


def some_shape(rng: random.Random) -> StepShape:
    rows = [(1, rng.randrange(1, 1000)) for _ in range(rng.choice([0, 1, 2, 4, 8]))]
    if rng.random() < 0.5 or not rows:
        rows.append((rng.randrange(2, 256), rng.choice([0, 100, 900])))
    return StepShape.of(rows)


def test_nothing_is_known_before_enough_was_seen():
    learner = StepLearner()
    for _ in range(200):
        learner.observe(StepShape.of([(1, 10)]), 0.01)
    assert learner.fit() is None, "one kind of step says nothing about the others"


def test_the_true_cost_is_learned_and_slow_outliers_are_not():
    rng, learner = random.Random(3), StepLearner()
    for _ in range(600):
        shape = some_shape(rng)
        hiccup = 30.0 if rng.random() < 0.05 else 1.0
        learner.observe(shape, COST.step_s(shape) * rng.uniform(0.97, 1.03) * hiccup)
    fit = learner.fit()
    assert fit is not None
    for _ in range(50):
        shape = some_shape(rng)
        assert abs(fit.cost.step_s(shape) / COST.step_s(shape) - 1) < 0.15


def test_a_flood_of_one_kind_does_not_push_out_the_others():
    rng, learner = random.Random(4), StepLearner()
    for _ in range(400):
        shape = some_shape(rng)
        learner.observe(shape, COST.step_s(shape))
    for _ in range(5000):
        learner.observe(StepShape.of([(1, 500)]), COST.step_s(StepShape.of([(1, 500)])))
    fit = learner.fit()
    assert fit is not None
    assert abs(fit.cost.prefill_s(200) / COST.prefill_s(200) - 1) < 0.1


def test_memory_is_bounded():
    learner = StepLearner()
    for n in range(5000):
        learner.observe(StepShape(1 << (n % 20), 1 << (n % 23), 1 << (n % 7), 1 << (n % 29)), 0.01)
    assert len(learner._kinds) <= KINDS_MAX


def test_a_step_without_length_is_ignored():
    learner = StepLearner()
    learner.observe(StepShape(1, 1), 0.0)
    learner.observe(StepShape(1, 1), float("nan"))
    assert learner.fit() is None
