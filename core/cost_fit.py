"""Fits the cost of a step to measured steps. Deciding code; apart from the model, because it needs numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from core.cost_model import Fit, StepCost, StepShape

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
