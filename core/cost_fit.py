"""Fits the cost of a step to measured steps. Deciding code; apart from the model, because it needs numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from core.cost_model import Fit, LinkCost, StepCost, StepShape

_Floats = npt.NDArray[np.float64]


def fit_steps(samples: Sequence[tuple[StepShape, float]]) -> Fit:
    """The coefficients with the least relative squared error, none below zero (active set: the most negative goes first).

    Raises ValueError for fewer samples than coefficients or a time that is not positive.
    """
    if len(samples) < 5:
        raise ValueError(f"{len(samples)} steps cannot be fitted; measure at least 5 of different shapes")
    seconds = np.array([taken for _, taken in samples], dtype=np.float64)
    if not (np.isfinite(seconds).all() and (seconds > 0).all()):
        raise ValueError("a measured step took no time, or no finite one")
    features = np.array([_features(shape) for shape, _ in samples], dtype=np.float64)
    coefficients = _nonnegative(features / seconds[:, None], np.ones(len(samples)))
    errors = np.abs(features @ coefficients - seconds) / seconds
    cost = StepCost(*map(float, coefficients))
    return Fit(cost, len(samples), float(np.median(errors)), float(np.quantile(errors, 0.9)))


def heldout_errors(samples: Sequence[tuple[StepShape, float]], folds: int = 5) -> tuple[float, float]:
    """Median and p90 of |predicted − measured| / measured on steps that the fit had not seen: each is left out once.

    Raises ValueError as `fit_steps` does, of what a fold leaves.
    """
    errors: list[float] = []
    for fold in range(folds):
        cost = fit_steps([sample for n, sample in enumerate(samples) if n % folds != fold]).cost
        left_out = samples[fold::folds]
        errors += [abs(cost.step_s(shape) - seconds) / seconds for shape, seconds in left_out]
    return float(np.median(errors)), float(np.quantile(errors, 0.9))


def fit_link(samples: Sequence[tuple[int, float]]) -> LinkCost:
    """From (bytes, seconds) of transfers of different sizes, the least relative squared error, nothing below zero.

    Raises ValueError when the times say nothing of a rate.
    """
    sizes = np.array([size for size, _ in samples], dtype=np.float64)
    seconds = np.array([taken for _, taken in samples], dtype=np.float64)
    if len(samples) < 2 or not (seconds > 0).all():
        raise ValueError(f"{len(samples)} transfers cannot be fitted; measure at least 2 of different sizes")
    features = np.stack([np.ones_like(sizes), sizes], axis=1)
    latency_s, byte_s = map(float, _nonnegative(features / seconds[:, None], np.ones(len(samples))))
    if byte_s <= 0:
        raise ValueError("larger transfers took no longer; measure larger ones")
    return LinkCost(latency_s, 1 / byte_s)


def _features(shape: StepShape) -> tuple[int, ...]:
    return (1, shape.prefill_tokens, shape.prefill_pairs, shape.decode_rows, shape.decode_context)


def _nonnegative(matrix: _Floats, target: _Floats) -> _Floats:
    scale = np.linalg.norm(matrix, axis=0)
    used = [column for column in range(matrix.shape[1]) if scale[column] > 0]
    while used:
        solved, *_ = np.linalg.lstsq(matrix[:, used] / scale[used], target, rcond=None)
        if (solved >= 0).all():
            break
        del used[int(np.argmin(solved))]
    result = np.zeros(matrix.shape[1])
    if used:
        result[used] = solved / scale[used]
    return result
