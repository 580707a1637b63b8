"""The workers of one role as columns, so that a thousand of them are scored at once. Deciding code.

A column is a numpy array with one element per worker, in order of their names. Reports cover all routers but are old; our
own claims are exact but only ours: of the two the larger counts, so that a burst does not herd onto one worker.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from core.cost_model import StepCost
from router.block_index import BlockIndex
from router.view import Claims, WorkerView

Column = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

UNKNOWN_COST = StepCost(base_s=2e-3, prefill_token_s=1e-4, prefill_pair_s=1e-8, decode_row_s=2e-4, decode_context_s=1e-7)
"""Of a pool in which nobody has learned anything yet: the shape is right, and workers are told apart by load alone."""


class CostColumns(NamedTuple):
    """What a step costs on each worker, as in `core.cost_model.StepCost`."""

    base_s: Column
    prefill_token_s: Column
    prefill_pair_s: Column
    decode_row_s: Column
    decode_context_s: Column


class Pool:
    """Columns of one role. `stale_after_s`: what is older counts as loaded at least as the mean of the pool."""

    def __init__(self, workers: Sequence[WorkerView], claims: Claims, stale_after_s: float = float("inf")) -> None:
        self.names = tuple(worker.worker_id for worker in workers)
        self.row = {name: row for row, name in enumerate(self.names)}
        self._claims = claims
        fresh = np.array([worker.age_s <= stale_after_s for worker in workers], dtype=np.bool_)
        self._reported_tokens = _discounted([worker.waiting_tokens for worker in workers], fresh)
        self._reported_running = _discounted([worker.running + worker.waiting for worker in workers], fresh)
        self._reported_context = _discounted([worker.context_tokens for worker in workers], fresh)
        self.room_blocks = _column([worker.blocks_free + worker.blocks_cached for worker in workers])
        self.blocks = _column([max(worker.blocks_total, 1) for worker in workers])
        self.block_tokens = _column([worker.layout.block_size if worker.layout else 1 for worker in workers])
        self.cost = _costs(workers)
        self.prefills = np.zeros(len(workers))
        self.claimed_tokens = np.zeros(len(workers))
        self.waiting_tokens = self._reported_tokens.copy()
        self.running = self._reported_running.copy()
        self.context = self._reported_context.copy()
        self._slots_version = -1
        self.refresh(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def refresh(self, names: Iterable[str]) -> None:
        """Claims on these workers changed."""
        claims = self._claims
        for name in names:
            row = self.row.get(name)
            if row is None:
                continue
            self.prefills[row] = claims.prefills(name)
            self.claimed_tokens[row] = tokens = claims.prefill_tokens(name)
            self.waiting_tokens[row] = max(self._reported_tokens[row], tokens)
            self.running[row] = max(self._reported_running[row], claims.running(name))
            self.context[row] = max(self._reported_context[row], claims.context_tokens(name))

    def of_slots(self, values: npt.NDArray[np.int64], index: BlockIndex) -> Column:
        """What the index has by slot, by row."""
        if self._slots_version != index.slots.version:
            self._slots, self._slots_version = index.places(self.names), index.slots.version
        return values[self._slots].astype(np.float64)

    def allowed(self, avoid: frozenset[str]) -> Mask:
        mask = np.ones(len(self.names), dtype=np.bool_)
        for name in avoid:
            row = self.row.get(name)
            if row is not None:
                mask[row] = False
        return mask

    def prefill_s(self, new_tokens: Column | float, context: Column | float = 0.0) -> Column:
        """Computing a prompt of `new_tokens` behind `context` alone, in one step, on each worker."""
        cost = self.cost
        looked_at = new_tokens * (context + (new_tokens + 1) / 2)
        return np.asarray(
            np.where(np.asarray(new_tokens) > 0, cost.base_s, 0.0)
            + cost.prefill_token_s * new_tokens
            + cost.prefill_pair_s * looked_at
        )

    def queue_s(self) -> Column:
        """Until what waits on each worker now is computed."""
        return self.prefill_s(self.waiting_tokens)

    def gap_s(self, more_rows: float = 0.0, more_context: float = 0.0) -> Column:
        """The gap between two tokens on each worker with so much more in its batch."""
        cost = self.cost
        return np.asarray(
            cost.base_s + cost.decode_row_s * (self.running + more_rows) + cost.decode_context_s * (self.context + more_context)
        )


def best(score: Column, mask: Mask, *ties: Column) -> int | None:
    """The row with the smallest score among those that `mask` allows; ties by the columns behind, then by name."""
    rows = np.flatnonzero(mask)
    for column in (score, *ties):
        if rows.size <= 1:
            break
        values = column[rows]
        rows = rows[values == values.min()]
    return int(rows[0]) if rows.size else None


def _column(values: Sequence[float]) -> Column:
    return np.array(values, dtype=np.float64)


def _discounted(values: Sequence[float], fresh: Mask) -> Column:
    column = np.maximum(_column(values), 0.0)  # a worker that reports nonsense is not the least loaded one for it
    if column.size and not fresh.all():
        column = np.where(fresh, column, np.maximum(column, column.mean()))
    return column


def _costs(workers: Sequence[WorkerView]) -> CostColumns:
    known = [worker.step_cost for worker in workers if worker.step_cost is not None]
    typical = _typical(known) if known else UNKNOWN_COST
    each = [worker.step_cost or typical for worker in workers]
    return CostColumns(*(_column([getattr(cost, name) for cost in each]) for name in CostColumns._fields))


def _typical(known: Sequence[StepCost]) -> StepCost:
    return StepCost(*(float(np.median([getattr(cost, name) for cost in known])) for name in CostColumns._fields))
