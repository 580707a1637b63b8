"""The workers of one role as columns, so that a thousand of them are scored at once. Deciding code.

A column is a numpy array with one element per worker, in order of their names. Reports cover all routers but are old; our
own claims are exact but only ours. So what a report has beyond our claims of that moment is taken for the work of others, and
our claims of now are added: a burst does not herd onto one worker, and what we have seen end does not count on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import ceil

import numpy as np
import numpy.typing as npt

from core.cost_model import StepCost
from core.request import WorkerRole
from router.block_index import BlockIndex
from router.calibration import CHUNK_TOKENS, Calibration
from router.cost_columns import Column, chunk_s, corrected, corrections_of, costs_of, standard_gap_s
from router.view import Claims, Held, WorkerView

Mask = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.int64]

ZERO, HALF, ONE = np.float64(0.0), np.float64(0.5), np.float64(1.0)
"""numpy takes its own numbers in half the time that it takes Python's: a microsecond less each."""
CHUNK = np.float64(CHUNK_TOKENS)

AHEAD_TOKENS = 1024
"""Of prompts, left to compute where the next one is sent to: a step is filled up with the prompt behind."""
TYPICAL_PROMPT_TOKENS = 512
"""Of others' prompts only the sum of tokens is known; their attention is that of prompts of this length."""


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
        typical: Callable[[], StepCost | None] = lambda: None,
    ) -> None:
        self.names = tuple(worker.worker_id for worker in workers)
        self.row = {name: row for row, name in enumerate(self.names)}
        self._claims = claims
        tokens, running, context, room, blocks, block_tokens, age_s = _reported(workers)
        ours = self._ours(claims.all_held() if then is None else then)
        fresh = age_s <= stale_after_s
        self._other_tokens, self._other_running, self._other_context = (
            _others(reported, held, fresh) for reported, held in zip((tokens, running, context), ours, strict=True)
        )
        self._seen_at = seen_at
        self.room_blocks: Column = room
        self.block_tokens: Column = block_tokens
        self.blocks = np.maximum(blocks, 1.0)
        self.room_tokens: Column = room * block_tokens
        self.corrections = corrections_of(calibration or Calibration(), self.names)
        self.cost = corrected(costs_of(workers, typical), self.corrections, [w.role is WorkerRole.PREFILL for w in workers])
        self.standard_chunk_s, self.standard_gap_s = chunk_s(self.cost), standard_gap_s(self.cost)
        self.ahead_s = self.prefill_s(float(AHEAD_TOKENS))
        self.shared_token_s = float(self.cost.prefill_token_s.mean()) / len(self.names) if self.names else 0.0
        self._everybody = np.ones(len(self.names), dtype=np.bool_)
        self._everywhere = np.arange(len(self.names))
        self._slots_version = -1
        self._queued_at: float | None = None
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
        self.decoding = self.running.copy()  # without those whose prompts are still being computed elsewhere
        self.gap_joined_s = self.gap_of_s(self.decoding + ONE, self.context)
        self._others_s = self._work_s(self._other_tokens, self._other_tokens * TYPICAL_PROMPT_TOKENS)
        self.gap_now_s = self.gap_s()

    def _ours(self, held: Mapping[str, Held]) -> npt.NDArray[np.float64]:
        """Tokens, requests and context of these claims, by row."""
        ours = np.zeros((3, len(self.names)))
        for name, one in held.items():
            row = self.row.get(name)
            if row is not None:
                ours[0, row], ours[1, row], ours[2, row] = one.prefill_tokens, one.running, one.context_tokens
        return ours

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
            self._queued_at = None
            self.prefills[row] = held.prefills
            self.window_tokens[row] = held.prefill_tokens if held.prefills else -np.inf  # alone, any prompt may go
            self._ours_s[row] = self._work_of(row, held)
            self._first_s[row], self._since[row] = self.prefill_of_s(row, float(held.first_tokens), 0.0), held.since
            self.waiting_tokens[row] = self._other_tokens.item(row) + held.prefill_tokens
            self.running[row] = running = self._other_running.item(row) + held.running
            self.context[row] = context = self._other_context.item(row) + held.context_tokens if running else 0.0
            self.coming[row], self.coming_tokens[row] = held.coming, held.coming_tokens
            self.decoding[row] = decoding = running - held.coming
            base_s, row_s = self.cost.base_s.item(row), self.cost.decode_row_s.item(row)
            context_s = self.cost.decode_context_s.item(row) * context
            self.gap_now_s[row] = base_s + row_s * running + context_s
            self.gap_joined_s[row] = base_s + row_s * (decoding + 1.0) + context_s

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

    def rows(self, avoid: frozenset[str]) -> Rows:
        """As `allowed`."""
        mask = self.allowed(avoid)
        return self._everywhere if mask is self._everybody else mask.nonzero()[0]

    def prefill_s(self, new_tokens: Column | float, context: Column | float = 0.0) -> Column:
        """Computing a prompt of `new_tokens` behind `context` alone, in chunks, on each worker."""
        cost = self.cost
        work_s: Column = cost.prefill_pair_s * (context + HALF * (new_tokens + ONE))
        work_s += cost.prefill_token_s
        work_s *= new_tokens
        work_s += np.ceil(new_tokens / CHUNK) * cost.base_s
        return work_s

    def queue_s(self, now: float = 0.0) -> Column:
        """Until what waits on each worker is computed: prompt by prompt, less what was done of the first one by now.

        That one may take longer than predicted, but never counts as more than done. Not to be written to.
        """
        if self._queued_at != now:
            done_s = np.minimum(np.maximum(np.float64(now) - self._since, ZERO), self._first_s)
            others_s = np.maximum(self._others_s - np.float64(max(now - self._seen_at, 0.0)), ZERO)
            self._queue_s, self._queued_at = self._ours_s - done_s + others_s, now
        return self._queue_s

    def prefill_of_s(self, row: int, new_tokens: float, context: float) -> float:
        """As `prefill_s`, of one worker."""
        cost = self.cost
        token_s = cost.prefill_token_s.item(row) + cost.prefill_pair_s.item(row) * (context + 0.5 * (new_tokens + 1))
        return float(ceil(new_tokens / CHUNK_TOKENS) * cost.base_s.item(row) + token_s * new_tokens)

    def queue_of_s(self, row: int, now: float) -> float:
        """As `queue_s`, of one worker."""
        done_s = min(max(now - self._since.item(row), 0.0), self._first_s.item(row))
        others_s = max(self._others_s.item(row) - max(now - self._seen_at, 0.0), 0.0)
        return float(self._ours_s.item(row) - done_s + others_s)

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

    def standard_gaps(self, row: int, ours: float, context: float) -> float:
        """How many standard gaps one takes with so many requests of ours in the batch, and those of others."""
        cost, others = self.cost, self._other_running.item(row)
        held = context + (self._other_context.item(row) if others else 0.0)
        gap_s = cost.base_s.item(row) + cost.decode_row_s.item(row) * (ours + others) + cost.decode_context_s.item(row) * held
        return float(gap_s / max(self.standard_gap_s.item(row), 1e-12))

    def gap_of_s(self, rows: Column, context: Column) -> Column:
        """The gap between two tokens in a batch of so many rows, which hold so many tokens together."""
        gap_s: Column = self.cost.decode_row_s * rows
        gap_s += self.cost.base_s
        gap_s += self.cost.decode_context_s * context
        return gap_s

    def gap_s(self, more_rows: float = 0.0, more_context: float = 0.0) -> Column:
        """The gap between two tokens on each worker with so much more in its batch."""
        return self.gap_of_s(self.running + np.float64(more_rows), self.context + np.float64(more_context))


def best(score: Column, mask: Mask, *ties: Column) -> int | None:
    """The row with the smallest score among those that `mask` allows; ties by the columns behind, then by name."""
    rows = np.flatnonzero(mask)
    for column in (score, *ties):
        if rows.size <= 1:
            break
        values = column[rows]
        rows = rows[values == values.min()]
    return int(rows[0]) if rows.size else None


def _reported(workers: Sequence[WorkerView]) -> npt.NDArray[np.float64]:
    """Waiting tokens, requests, context, blocks to be had, blocks in all, tokens per block, age: a row of each."""
    table = [
        (
            one.waiting_tokens,
            one.running + one.waiting,
            one.context_tokens,
            one.blocks_free + one.blocks_cached,
            one.blocks_total,
            one.layout.block_size if one.layout else 1,
            one.age_s,
        )
        for one in workers
    ]
    return np.array(table, dtype=np.float64).reshape(-1, 7).T.copy()


def _others(reported: Column, ours: Column, fresh: Mask) -> Column:
    column = np.maximum(reported, 0.0)  # a worker that reports nonsense is not the least loaded one for it
    if column.size and not fresh.all():
        column = np.where(fresh, column, np.maximum(column, column.mean()))
    return np.maximum(column - ours, 0.0)
