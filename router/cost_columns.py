"""What steps cost on each worker of a pool, in columns: as learned, as typical where nothing was, and as outcomes correct it.
Deciding code."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from core.cost_model import StepCost
from router.calibration import CHUNK_TOKENS, GAP_CONTEXT, NO_CORRECTION, Calibration
from router.view import WorkerView

Column = npt.NDArray[np.float64]

UNKNOWN_COST = StepCost(base_s=2e-3, prefill_token_s=1e-4, prefill_pair_s=1e-8, decode_row_s=2e-4, decode_context_s=1e-7)
"""Of a pool in which nobody has learned anything yet: the shape is right, and workers are told apart by load alone."""
FACTOR_MAX = 20.0
"""By which outcomes may correct what a worker learned of itself."""
ALIKE = 1.3
"""Corrections of two workers that differ by less say nothing of either."""


class Corrections(NamedTuple):
    """`router.calibration.Correction` of each worker."""

    chunk_s: Column
    gap_s: Column
    overhead_s: Column
    join_s: Column


class CostColumns(NamedTuple):
    """What a step costs on each worker, as in `core.cost_model.StepCost`."""

    base_s: Column
    prefill_token_s: Column
    prefill_pair_s: Column
    decode_row_s: Column
    decode_context_s: Column


def corrections_of(known: Calibration, names: Sequence[str]) -> Corrections:
    """What outcomes say of these workers, 0 where they say nothing yet."""
    each = [known.of(name) for name in names]
    if all(one is NO_CORRECTION for one in each):
        return Corrections(*np.zeros((len(Corrections._fields), len(names))))
    return Corrections(*np.array(each, dtype=np.float64).T.copy())


def corrected(cost: CostColumns, known: Corrections, prefills_only: Sequence[bool]) -> CostColumns:
    """Costs under which a standard chunk and a standard gap take what they were seen to take."""
    alone = np.array(prefills_only, dtype=np.bool_)
    prefill, gap = _factor(known.chunk_s, chunk_s(cost)), _factor(known.gap_s, standard_gap_s(cost))
    return CostColumns(
        cost.base_s * np.where(alone, prefill, gap),
        cost.prefill_token_s * prefill,
        cost.prefill_pair_s * prefill,
        cost.decode_row_s * gap,
        cost.decode_context_s * gap,
    )


def _factor(seen_s: Column, predicted_s: Column) -> Column:
    """The median over all workers is everybody's; of what one differs by, only what is beyond ALIKE is its own. Outcomes come
    late, and whoever follows their noise sends all that comes to one worker until it is the slower one."""
    known = seen_s > 0
    if not known.any():
        return np.ones_like(seen_s)
    factor = np.clip(seen_s / np.maximum(predicted_s, 1e-12), 1 / FACTOR_MAX, FACTOR_MAX)
    common = float(np.median(factor[known]))
    own = np.where(known, factor / common, 1.0)
    return np.asarray(common * np.where(own > ALIKE, own / ALIKE, np.where(own < 1 / ALIKE, own * ALIKE, 1.0)))


def chunk_s(cost: CostColumns) -> Column:
    """A standard chunk of a prompt."""
    tokens = CHUNK_TOKENS
    return cost.base_s + cost.prefill_token_s * tokens + cost.prefill_pair_s * (tokens * (tokens + 1) / 2)


def standard_gap_s(cost: CostColumns) -> Column:
    """The gap between two tokens of a standard request that is alone."""
    return cost.base_s + cost.decode_row_s + cost.decode_context_s * GAP_CONTEXT


def typical_cost(workers: Iterable[WorkerView]) -> StepCost | None:
    """The median of each coefficient over those that have learned it; None while nobody has learned anything."""
    return _typical([_coefficients(worker.step_cost) for worker in workers if worker.step_cost is not None])


def _typical(learned: Sequence[tuple[float, ...]]) -> StepCost | None:
    if not learned:
        return None
    columns = np.array(learned, dtype=np.float64).T
    return StepCost(*(float(np.median(known)) if (known := column[column > 0]).size else 0.0 for column in columns))


def costs_of(workers: Sequence[WorkerView], typical: Callable[[], StepCost | None]) -> CostColumns:
    """What workers learned; for those that have not, what is typical of this pool, then of the cluster."""
    learned = [_coefficients(worker.step_cost) for worker in workers if worker.step_cost is not None]
    table = learned
    if len(learned) < len(workers):
        here = _coefficients(_typical(learned) or typical() or UNKNOWN_COST)
        table = [here if worker.step_cost is None else _coefficients(worker.step_cost) for worker in workers]
    cost = CostColumns(*np.array(table, dtype=np.float64).reshape(-1, 5).T.copy())
    without = (cost.prefill_token_s <= 0) & (cost.prefill_pair_s <= 0)  # a fit without a single prompt: they cost nothing
    if without.any():
        anywhere = typical() or _typical(learned) or UNKNOWN_COST
        cost.prefill_token_s[without], cost.prefill_pair_s[without] = anywhere.prefill_token_s, anywhere.prefill_pair_s
    return cost


def _coefficients(cost: StepCost) -> tuple[float, ...]:
    return cost.base_s, cost.prefill_token_s, cost.prefill_pair_s, cost.decode_row_s, cost.decode_context_s
