"""What is predicted of a placement: columns over pools, then any pair of rows exactly. Deciding code.

For every prefill worker the time to the first token, for every decode worker the gap between tokens once the request has
joined. What a pair takes is nearly the sum of what is known of either, so the best pair is found among the best rows of both
sides, which are few, and only those are looked at one by one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from router.baselines import matched_tokens
from router.cost_columns import Column
from router.forecast_columns import CHUNK_TOKENS, LOOKED_AT, best_rows, harmed, lowest, met_there, missing, prompt_columns
from router.policy import Candidate, Need, Pair
from router.pools import CHUNK, HALF, ZERO, Pool, Rows
from router.ranking import Goal, Rank, rank_of, reason_of
from router.situation import Situation


class Ranked(NamedTuple):
    """A placement. `prefill` and `decode` are rows of `made`."""

    rank: Rank
    made: Split | Whole
    prefill: int
    decode: int

    def candidate(self) -> Candidate:
        return self.made.candidate(self.rank, self.prefill, self.decode)

    def ttft_s(self) -> float:
        return self.made.ttft_s(self.prefill)

    def runs_beside(self) -> float:
        """Requests that decode where it would."""
        return self.made.running(self.decode)

    def computes(self) -> float:
        """Tokens of the prompt that nobody has cached there."""
        return self.made.new.item(self.prefill)


class _Side(NamedTuple):
    """A decode worker of a pair."""

    row: int
    name: str
    gap_s: float
    load: float
    harm: float


class Split:
    """Prefill and decode on two workers. Neither pool is empty."""

    def __init__(self, situation: Situation, prefill: Pool, decode: Pool, need: Need, goal: Goal) -> None:
        self._prefill, self._decode, self._goal = prefill, decode, goal
        cached = matched_tokens(situation, prefill, need)
        new, self._queue_s, self._prefill_s = prompt_columns(situation, prefill, need, cached)
        computed_s = self._queue_s + self._prefill_s
        self._ttft_s = prefill.corrections.overhead_s + computed_s
        link = situation.view.link
        self.new, self._latency_s, self._token_s = new, link.latency_s, situation.token_bytes / link.bytes_per_s
        self._computed_s, self._context = computed_s, np.float64(need.tokens + need.output_tokens / 2)
        self._sides: list[_Side] | None = None
        self._sides_on: Rows | None = None

    def ttft_s(self, p: int) -> float:
        return self._ttft_s.item(p)

    def soonest_s(self, may_prefill: Rows) -> float:
        """The first token where it comes first. There are rows."""
        return lowest(self._ttft_s[may_prefill])

    def best(self, may_prefill: Rows, may_decode: Rows, goal: Goal) -> list[Ranked]:
        """The best pairs of these rows, in no order. `goal`: that of the making, but for the limit of the first token."""
        first_s, tenth = self._ttft_s, goal.tenth
        if lowest(self.new) < CHUNK_TOKENS:
            first_s = first_s + np.float64(goal.output_tokens * tenth * self._token_s) * np.minimum(self.new, CHUNK)
        first = best_rows(may_prefill, missing(None, (self._ttft_s, goal.ttft_s)), first_s)
        if self._sides is None or self._sides_on is not may_decode:
            self._sides, self._sides_on = self._best_sides(may_decode), may_decode
        sides = self._sides
        pairs = []
        for n, p in enumerate(first, start=1):
            ttft_s, late_s = self._ttft_s.item(p), tenth * self._exposed_s(p)
            name, load = self._prefill.names[p], self._prefill.waiting_tokens.item(p)
            for side in sides[: LOOKED_AT // n]:  # who is better on both sides comes first
                rank = rank_of(goal, side.harm, ttft_s, side.gap_s + late_s, load + side.load, side.name + name)
                pairs.append(Ranked(rank, self, p, side.row))
        return pairs

    def _best_sides(self, may_decode: Rows) -> list[_Side]:
        """The best decode workers, whatever prefill worker goes with them: so they are looked for once."""
        decode, goal, cost = self._decode, self._goal, self._decode.cost
        before_s = met_there(self._prefill, decode, goal, lowest(self._computed_s))
        self._step_s = step_s = before_s + cost.decode_row_s + cost.decode_context_s * self._context
        harmed_ = harmed(decode, before_s, step_s, goal)
        join_s, last_s = decode.corrections.join_s, self._latency_s + CHUNK_TOKENS * self._token_s
        gap_s = step_s + np.float64(goal.tenth) * (join_s + np.float64(last_s))
        rows = best_rows(may_decode, missing(harmed_, (gap_s, goal.gap_s)), gap_s)
        return [
            _Side(
                row,
                decode.names[row],
                step_s.item(row) + goal.tenth * join_s.item(row),
                decode.running.item(row),
                0.0 if harmed_ is None else harmed_.item(row),
            )
            for row in rows
        ]

    def running(self, d: int) -> float:
        return self._decode.running.item(d)

    def candidate(self, rank: Rank, p: int, d: int) -> Candidate:
        prefill, decode, goal = self._prefill, self._decode, self._goal
        step_s, late_s = self._step_s.item(d), self._late_s(p, d)
        return Candidate(
            Pair(prefill.names[p], decode.names[d]),
            self._ttft_s.item(p),
            step_s + goal.tenth * late_s,
            rank[2],
            reason_of(rank),
            overhead_s=prefill.corrections.overhead_s.item(p),
            queue_s=self._queue_s.item(p),
            prefill_s=self._prefill_s.item(p),
            transfer_s=late_s,
            tpot_s=step_s + late_s / max(1.0, goal.output_tokens - 1.0),
            step_s=step_s,
            standard_chunk_s=prefill.standard_chunk_s.item(p),
            standard_gap_s=decode.standard_gap_s.item(d),
        )

    def _exposed_s(self, p: int) -> float:
        """What of the transfer is left when the last chunk is computed."""
        return self._latency_s + min(float(self.new.item(p)), CHUNK_TOKENS) * self._token_s

    def _late_s(self, p: int, d: int) -> float:
        """What the hand-off adds to the first gap."""
        return self._exposed_s(p) + float(self._decode.corrections.join_s.item(d))


class Whole:
    """Everything on one worker of `pool`, beside what decodes there."""

    def __init__(self, situation: Situation, pool: Pool, need: Need, goal: Goal) -> None:
        self._situation, self._pool, self._need, self._goal = situation, pool, need, goal
        self._cached = matched_tokens(situation, pool, need)
        self.new = np.float64(need.tokens) - self._cached
        self.tokens = need.tokens
        self._made = False

    def at_best_s(self) -> Column:
        """Less than the time until the last token can be."""
        pool, need = self._pool, self._need
        new = np.minimum(self.new, np.float64(need.tokens - self._situation.best_tokens(need.keys, need.tokens)))
        token_s = pool.cost.prefill_token_s + pool.cost.prefill_pair_s * (np.float64(need.tokens) - HALF * new)
        return np.asarray(token_s * new + np.float64(self._goal.output_tokens) * pool.gap_now_s)

    def handing_over_s(self) -> Column:
        """What streams would wait here for a prompt that was computed elsewhere: its last chunk, and the turn it joins with."""
        link = self._situation.view.link
        moved_bytes = min(self._need.tokens, CHUNK_TOKENS) * self._situation.token_bytes
        return np.asarray(np.float64(link.latency_s + moved_bytes / link.bytes_per_s) + self._pool.corrections.join_s)

    def best(self, may: Rows, goal: Goal) -> list[Ranked]:
        """The best of these rows, in no order. `goal` as of `Split.best`."""
        if not may.size:
            return []
        if not self._made:
            self._make()
        pool = self._pool
        total_s = self._ttft_s + np.float64(goal.output_tokens) * self._gap_s
        missed = missing(self._harmed, (self._ttft_s, goal.ttft_s), (self._gap_s, goal.gap_s))
        return [
            Ranked(
                rank_of(
                    goal,
                    0.0 if self._harmed is None else self._harmed.item(row),
                    self._ttft_s.item(row),
                    self._gap_s.item(row),
                    pool.waiting_tokens.item(row) + pool.running.item(row),
                    pool.names[row],
                ),
                self,
                row,
                row,
            )
            for row in best_rows(may, missed, total_s)
        ]

    def ttft_s(self, row: int) -> float:
        return self._ttft_s.item(row)

    def running(self, row: int) -> float:
        return self._pool.running.item(row)

    def candidate(self, rank: Rank, _: int, row: int) -> Candidate:
        pool, gap_s = self._pool, self._gap_s.item(row)
        return Candidate(
            Pair(None, pool.names[row]),
            self._ttft_s.item(row),
            gap_s,
            rank[2],
            reason_of(rank),
            overhead_s=pool.corrections.overhead_s.item(row),
            queue_s=self._queue_s.item(row),
            prefill_s=self._prefill_s.item(row),
            tpot_s=gap_s,
            step_s=gap_s,
            standard_chunk_s=pool.standard_chunk_s.item(row),
            standard_gap_s=pool.standard_gap_s.item(row),
        )

    def _make(self) -> None:
        """Only for who looks: most decode workers are not asked to compute prompts."""
        self._made = True
        pool, need = self._pool, self._need
        now_s = pool.gap_now_s
        self.new, self._queue_s, alone_s = prompt_columns(self._situation, pool, need, self._cached)
        steps = np.ceil((self.new + pool.waiting_tokens) / CHUNK)
        self._prefill_s = alone_s + steps * (now_s - pool.cost.base_s)  # decodes run along
        turn_s = np.where(pool.running > ZERO, HALF * now_s, ZERO)  # the step that is under way
        self._ttft_s = pool.corrections.overhead_s + turn_s + self._queue_s + self._prefill_s
        self._gap_s = pool.gap_s(1.0, need.tokens + need.output_tokens / 2)
        felt_s = now_s + pool.cost.prefill_token_s * np.minimum(self.new, CHUNK)
        self._harmed = harmed(pool, now_s, felt_s, self._goal)
