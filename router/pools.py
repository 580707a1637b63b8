"""The workers of one role as columns, so that a thousand of them are scored at once. Deciding code.

A column is a numpy array with one element per worker, in order of their names. Reports cover all routers but are old; our
own claims are exact but only ours. So what a report has beyond our claims of that moment is taken for the work of others, and
our claims of now are added: a burst does not herd onto one worker, and what we have seen end does not count on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from core.cost_model import StepCost
from core.request import WorkerRole
from router.block_index import BlockIndex
from router.calibration import CHUNK_TOKENS, GAP_CONTEXT, Calibration
from router.view import NOTHING, Claims, Held, WorkerView

Column = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.int64]

UNKNOWN_COST = StepCost(base_s=2e-3, prefill_token_s=1e-4, prefill_pair_s=1e-8, decode_row_s=2e-4, decode_context_s=1e-7)
"""Of a pool in which nobody has learned anything yet: the shape is right, and workers are told apart by load alone."""


FACTOR_MAX = 20.0
"""By which outcomes may correct what a worker learned of itself."""
TYPICAL_PROMPT_TOKENS = 512
"""Of others' prompts only the sum of tokens is known; their attention is that of prompts of this length."""


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


class Pool:
    """Columns of one role. `stale_after_s`: what is older counts as loaded at least as the mean of the pool.

    `then`: our claims when the reports came (None: now), at the time `seen_at`. `typical`: what steps cost in the cluster, for
    workers that have learned nothing, or nothing of prompts because they never computed one.
    """

    def __init__(
        self,
        workers: Sequence[WorkerView],
        claims: Claims,
        stale_after_s: float = float("inf"),
        then: Mapping[str, Held] | None = None,
        seen_at: float = 0.0,
        calibration: Calibration | None = None,
        typical: StepCost | None = None,
    ) -> None:
        self.names = tuple(worker.worker_id for worker in workers)
        self.row = {name: row for row, name in enumerate(self.names)}
        self._claims = claims
        fresh = np.array([worker.age_s <= stale_after_s for worker in workers], dtype=np.bool_)
        held = claims.all_held() if then is None else then
        ours = [held.get(name, NOTHING) for name in self.names]
        self._other_tokens = _others([w.waiting_tokens for w in workers], [h.prefill_tokens for h in ours], fresh)
        self._other_running = _others([w.running + w.waiting for w in workers], [h.running for h in ours], fresh)
        self._other_context = _others([w.context_tokens for w in workers], [h.context_tokens for h in ours], fresh)
        self._seen_at = seen_at
        self.room_blocks = _column([worker.blocks_free + worker.blocks_cached for worker in workers])
        self.blocks = _column([max(worker.blocks_total, 1) for worker in workers])
        self.block_tokens = _column([worker.layout.block_size if worker.layout else 1 for worker in workers])
        self.room_tokens = self.room_blocks * self.block_tokens
        known = calibration or Calibration()
        each = [known.of(name) for name in self.names]
        self.corrections = Corrections(*(_column([getattr(one, name) for one in each]) for name in Corrections._fields))
        self.cost = _corrected(_costs(workers, typical), self.corrections, [w.role is WorkerRole.PREFILL for w in workers])
        self.standard_chunk_s, self.standard_gap_s = _chunk_s(self.cost), _gap_s(self.cost)
        self.shared_token_s = float(self.cost.prefill_token_s.mean()) / len(self.names) if self.names else 0.0
        self._everybody = np.ones(len(self.names), dtype=np.bool_)
        self._slots_version = -1
        self._without_claims()
        self.refresh(claims.all_held())

    def _without_claims(self) -> None:
        """The columns that `refresh` keeps, as they are where we have nothing."""
        self.prefills, self.coming, self.coming_tokens, self._ours_s, self._first_s, self._since = np.zeros(
            (6, len(self.names))
        )
        self.window_tokens = np.full(len(self.names), -np.inf)
        self.waiting_tokens = self._other_tokens.copy()
        self.running = self._other_running.copy()
        self.context = np.where(self.running > 0, self._other_context, 0.0)
        self._others_s = self._work_s(self._other_tokens, self._other_tokens * TYPICAL_PROMPT_TOKENS)
        self.gap_now_s = self.gap_s()

    def __len__(self) -> int:
        return len(self.names)

    def refresh(self, names: Iterable[str]) -> None:
        """Claims on these workers changed."""
        claims = self._claims
        for name in names:
            row = self.row.get(name)
            if row is None:
                continue
            held = claims.held(name)
            self.prefills[row] = held.prefills
            self.window_tokens[row] = held.prefill_tokens if held.prefills else -np.inf  # alone, any prompt may go
            self._ours_s[row] = ours_s = self._work_of(row, held)
            self._first_s[row], self._since[row] = ours_s / max(held.prefills, 1), held.since
            self.waiting_tokens[row] = self._other_tokens.item(row) + held.prefill_tokens
            self.running[row] = running = self._other_running.item(row) + held.running
            self.context[row] = context = self._other_context.item(row) + held.context_tokens if running else 0.0
            self.coming[row], self.coming_tokens[row] = held.coming, held.coming_tokens
            gap_s = self.cost.base_s.item(row) + self.cost.decode_row_s.item(row) * running
            self.gap_now_s[row] = gap_s + self.cost.decode_context_s.item(row) * context

    def only(self, row: int) -> Pool:
        """The columns of one worker, as they are now; means are still those of all."""
        one = copy(self)
        one.names, one.row = (self.names[row],), {self.names[row]: 0}
        span = slice(row, row + 1)
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                setattr(one, name, value[span])
        one.corrections = Corrections(*(column[span] for column in self.corrections))
        one.cost = CostColumns(*(column[span] for column in self.cost))
        one._slots_version = -1
        return one

    def of_slots(self, values: Column, index: BlockIndex) -> Column:
        """What the index has by slot, by row."""
        if self._slots_version != index.slots.version:
            self._slots, self._slots_version = index.places(self.names), index.slots.version
        found: Column = values[self._slots]
        return found

    def allowed(self, avoid: frozenset[str]) -> Mask:
        """Everybody but these. Not to be written to."""
        rows = [row for name in avoid if (row := self.row.get(name)) is not None]
        if not rows:
            return self._everybody
        mask = self._everybody.copy()
        mask[rows] = False
        return mask

    def prefill_s(self, new_tokens: Column | float, context: Column | float = 0.0) -> Column:
        """Computing a prompt of `new_tokens` behind `context` alone, in chunks, on each worker."""
        cost = self.cost
        token_s = cost.prefill_token_s + cost.prefill_pair_s * (context + 0.5 * (new_tokens + 1))
        return np.asarray(np.ceil(new_tokens / CHUNK_TOKENS) * cost.base_s + token_s * new_tokens)

    def queue_s(self, now: float = 0.0) -> Column:
        """Until what waits on each worker is computed: prompt by prompt, less what was done of the first one by now.

        That one may take longer than predicted, but never counts as more than done.
        """
        done_s = np.minimum(np.maximum(now - self._since, 0.0), self._first_s)
        return self._ours_s - done_s + np.maximum(self._others_s - max(now - self._seen_at, 0.0), 0.0)

    def _work_s(self, tokens: Column, squares: Column) -> Column:
        """Prompts that have so many tokens together, and so many squared. Short ones share steps."""
        cost = self.cost
        steps_s = np.ceil(tokens / CHUNK_TOKENS) * cost.base_s
        return np.asarray(steps_s + cost.prefill_token_s * tokens + cost.prefill_pair_s * (squares + tokens) / 2)

    def _work_of(self, row: int, held: Held) -> float:
        """As `_work_s`, of our prompts on one worker."""
        cost, tokens = self.cost, held.prefill_tokens
        steps_s = -(-tokens // CHUNK_TOKENS) * cost.base_s[row]
        return float(
            steps_s + cost.prefill_token_s[row] * tokens + cost.prefill_pair_s[row] * (held.prefill_squares + tokens) / 2
        )

    def gap_of_s(self, rows: Column, context: Column) -> Column:
        """The gap between two tokens in a batch of so many rows, which hold so many tokens together."""
        cost = self.cost
        return np.asarray(cost.base_s + cost.decode_row_s * rows + cost.decode_context_s * context)

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


def _others(reported: Sequence[float], ours: Sequence[float], fresh: Mask) -> Column:
    return np.maximum(_discounted(reported, fresh) - _column(ours), 0.0)


def _corrected(cost: CostColumns, known: Corrections, prefills_only: Sequence[bool]) -> CostColumns:
    """Costs under which a standard chunk and a standard gap take what they were seen to take."""
    alone = np.array(prefills_only, dtype=np.bool_)
    prefill, gap = _factor(known.chunk_s, _chunk_s(cost)), _factor(known.gap_s, _gap_s(cost))
    return CostColumns(
        cost.base_s * np.where(alone, prefill, gap),
        cost.prefill_token_s * prefill,
        cost.prefill_pair_s * prefill,
        cost.decode_row_s * gap,
        cost.decode_context_s * gap,
    )


def _factor(seen_s: Column, predicted_s: Column) -> Column:
    factor = np.clip(seen_s / np.maximum(predicted_s, 1e-12), 1 / FACTOR_MAX, FACTOR_MAX)
    return np.where(seen_s > 0, factor, 1.0)


def _chunk_s(cost: CostColumns) -> Column:
    tokens = CHUNK_TOKENS
    return cost.base_s + cost.prefill_token_s * tokens + cost.prefill_pair_s * (tokens * (tokens + 1) / 2)


def _gap_s(cost: CostColumns) -> Column:
    return cost.base_s + cost.decode_row_s + cost.decode_context_s * GAP_CONTEXT


def typical_cost(workers: Iterable[WorkerView]) -> StepCost | None:
    """The median of each coefficient over those that have learned it; None while nobody has learned anything."""
    known = [worker.step_cost for worker in workers if worker.step_cost is not None]
    if not known:
        return None
    learned = ([value for cost in known if (value := getattr(cost, name)) > 0] for name in CostColumns._fields)
    return StepCost(*(float(np.median(values)) if values else 0.0 for values in learned))


def _costs(workers: Sequence[WorkerView], typical: StepCost | None) -> CostColumns:
    own = typical_cost(workers)
    here, anywhere = own or typical or UNKNOWN_COST, typical or own or UNKNOWN_COST
    each = [_with_prompts(worker.step_cost or here, anywhere) for worker in workers]
    return CostColumns(*(_column([getattr(cost, name) for cost in each]) for name in CostColumns._fields))


def _with_prompts(cost: StepCost, other: StepCost) -> StepCost:
    """A fit without a single prompt says that prompts cost nothing."""
    if cost.prefill_token_s > 0 or cost.prefill_pair_s > 0:
        return cost
    return replace(cost, prefill_token_s=other.prefill_token_s, prefill_pair_s=other.prefill_pair_s)
