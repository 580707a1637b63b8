"""What is predicted of a placement: columns over pools, then any pair of rows exactly. Deciding code.

For every prefill worker the time to the first token, for every decode worker the gap between tokens once the request has
joined. What a pair takes is nearly the sum of what is known of either, so the best pair is found among the best rows of both
sides, which are few, and only those are looked at one by one.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from router.baselines import matched_tokens
from router.policy import Candidate, Need, Pair
from router.pools import Column, Pool, Rows
from router.situation import Situation

LOOKED_AT = 4
"""Rows of a pool that are ranked exactly."""
CHUNK_TOKENS = 256
"""Of chunked prefill beside decodes: what one step adds to a gap."""
ASKING_S = 2e-3
"""Finding out who has the blocks of a prompt."""
NEAR = 0.9
"""Part of a limit that a prediction may fill: predictions err."""


class Goal(NamedTuple):
    """What predictions of the first token and of gaps may be (infinity where there is no limit), and the tokens expected.
    `tenth`: of one late gap, what it adds to the mean of the slowest tenth of gaps."""

    ttft_s: float
    gap_s: float
    output_tokens: float
    tenth: float

    @staticmethod
    def of(need: Need) -> Goal:
        gaps = [limit for limit in (need.slo.tbt_s, need.slo.tpot_s) if limit is not None]
        ttft_s = need.slo.ttft_s or math.inf
        tenth = 1 / max(1.0, need.output_tokens / 10)
        return Goal(NEAR * ttft_s, NEAR * min(gaps) if gaps else math.inf, need.output_tokens, tenth)


Rank = tuple[float, float, float, float, str]
"""Smaller is better: requests expected to miss a limit, then by how much this one does, then the time until its last token;
ties go to the less loaded, then by name."""


class Ranked(NamedTuple):
    """A placement. `prefill` and `decode` are rows of `made`."""

    rank: Rank
    made: Split | Whole
    prefill: int
    decode: int

    def candidate(self) -> Candidate:
        return self.made.candidate(self.rank, self.prefill, self.decode)

    def runs_beside(self) -> float:
        """Requests that decode where it would."""
        return self.made.running(self.decode)

    def computes(self) -> float:
        """Tokens of the prompt that nobody has cached there."""
        return self.made.new.item(self.prefill)


class Split:
    """Prefill and decode on two workers. Neither pool is empty."""

    def __init__(self, situation: Situation, prefill: Pool, decode: Pool, need: Need, goal: Goal) -> None:
        self._prefill, self._decode, self._goal = prefill, decode, goal
        cached = matched_tokens(situation, prefill, need)
        new, self._queue_s, self._prefill_s = _prompt(situation, prefill, need, cached)
        computed_s = self._queue_s + self._prefill_s
        self._ttft_s = prefill.corrections.overhead_s + computed_s
        link = situation.view.link
        self.new, self._latency_s, self._token_s = new, link.latency_s, situation.token_bytes / link.bytes_per_s
        before_s = _met_there(prefill, decode, goal, float(computed_s.min()))
        cost = decode.cost
        self._step_s = before_s + cost.decode_row_s + cost.decode_context_s * (need.tokens + need.output_tokens / 2)
        self._harmed = harmed(decode, before_s, self._step_s, goal)

    def best(self, may_prefill: Rows, may_decode: Rows) -> list[Ranked]:
        """The best pairs of these rows, in no order."""
        goal, tenth = self._goal, self._goal.tenth
        prefill, decode, harmed_ = self._prefill, self._decode, self._harmed
        first_s, last_chunk = self._ttft_s, CHUNK_TOKENS * self._token_s
        if self.new.min() < CHUNK_TOKENS:
            first_s = first_s + goal.output_tokens * tenth * self._token_s * np.minimum(self.new, CHUNK_TOKENS)
        gap_s = self._step_s + tenth * (decode.corrections.join_s + (self._latency_s + last_chunk))
        first = _best(may_prefill, _missing(None, (self._ttft_s, goal.ttft_s)), first_s)
        then = _best(may_decode, _missing(harmed_, (gap_s, goal.gap_s)), gap_s)
        sides = [
            (d, decode.names[d], self._step_s.item(d) + tenth * decode.corrections.join_s.item(d), decode.running.item(d),
             0.0 if harmed_ is None else harmed_.item(d))
            for d in then
        ]  # fmt: skip
        pairs = []
        for n, p in enumerate(first, start=1):
            ttft_s, late_s = self._ttft_s.item(p), tenth * self._exposed_s(p)
            name, load = prefill.names[p], prefill.waiting_tokens.item(p)
            for d, its_name, its_gap_s, its_load, harm in sides[: LOOKED_AT // n]:  # who is better on both sides comes first
                rank = rank_of(goal, harm, ttft_s, its_gap_s + late_s, load + its_load, its_name + name)
                pairs.append(Ranked(rank, self, p, d))
        return pairs

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
        self.new = need.tokens - self._cached
        self.tokens = need.tokens

    def at_best_s(self) -> Column:
        """Less than the time until the last token can be."""
        pool, need = self._pool, self._need
        new = np.minimum(self.new, need.tokens - self._situation.best_tokens(need.keys, need.tokens))
        token_s = pool.cost.prefill_token_s + pool.cost.prefill_pair_s * (need.tokens - 0.5 * new)
        return np.asarray(token_s * new + self._goal.output_tokens * pool.gap_now_s)

    def handing_over_s(self) -> Column:
        """What streams would wait here for a prompt that was computed elsewhere: its last chunk, and the turn it joins with."""
        link = self._situation.view.link
        moved_bytes = min(self._need.tokens, CHUNK_TOKENS) * self._situation.token_bytes
        return np.asarray(link.latency_s + moved_bytes / link.bytes_per_s + self._pool.corrections.join_s)

    def best(self, may: Rows) -> list[Ranked]:
        """The best of these rows, in no order."""
        if not may.size:
            return []
        self._make()
        goal, pool = self._goal, self._pool
        total_s = self._ttft_s + goal.output_tokens * self._gap_s
        missed = _missing(self._harmed, (self._ttft_s, goal.ttft_s), (self._gap_s, goal.gap_s))
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
            for row in _best(may, missed, total_s)
        ]

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
        pool, need = self._pool, self._need
        now_s = pool.gap_now_s
        self.new, self._queue_s, alone_s = _prompt(self._situation, pool, need, self._cached)
        steps = np.ceil((self.new + pool.waiting_tokens) / CHUNK_TOKENS)
        self._prefill_s = alone_s + steps * (now_s - pool.cost.base_s)  # decodes run along
        turn_s = np.where(pool.running > 0, 0.5 * now_s, 0.0)  # the step that is under way
        self._ttft_s = pool.corrections.overhead_s + turn_s + self._queue_s + self._prefill_s
        self._gap_s = pool.gap_s(1.0, need.tokens + need.output_tokens / 2)
        felt_s = now_s + pool.cost.prefill_token_s * np.minimum(self.new, CHUNK_TOKENS)
        self._harmed = harmed(pool, now_s, felt_s, self._goal)


def _prompt(situation: Situation, pool: Pool, need: Need, cached: Column) -> tuple[Column, Column, Column]:
    """On each worker the tokens to compute, the time until it begins with them, and what they take it.

    With what the worker has of the prompt, or with the longest prefix that anybody has, fetched while others are computed,
    whichever is sooner (Mooncake's Conductor, FAST '25, algorithm 1, with times for its hand-tuned ratio: a prefix is
    replicated where waiting for its holder takes longer).
    """
    new, queue_s = need.tokens - cached, pool.queue_s(need.now)
    prefill_s = pool.prefill_s(new, cached)
    best = situation.best_tokens(need.keys, need.tokens)
    if not cached.size or best <= cached.min():
        return new, queue_s, prefill_s
    link = situation.view.link
    fetch_s = ASKING_S + link.latency_s + (best - cached) * (situation.token_bytes / link.bytes_per_s)
    begins_s, rest_s = np.maximum(queue_s, fetch_s), pool.prefill_s(float(need.tokens - best), float(best))
    sooner = (begins_s + rest_s < queue_s + prefill_s) & (cached < best)
    return (
        np.where(sooner, need.tokens - best, new),
        np.where(sooner, begins_s, queue_s),
        np.where(sooner, rest_s, prefill_s),
    )


def rank_of(goal: Goal, harm: float, ttft_s: float, gap_s: float, load: float, name: str) -> Rank:
    risk, over = harm, 0.0
    for predicted_s, limit_s in ((ttft_s, goal.ttft_s), (gap_s, goal.gap_s)):
        if predicted_s > limit_s:
            by = predicted_s / limit_s - 1.0
            risk, over = risk + min(by, 1.0), over + by
    return risk, over, ttft_s + goal.output_tokens * gap_s, load, name


def reason_of(rank: Rank) -> str:
    risk, over, *_ = rank
    text = f"{risk:.2g} at risk" if risk else "within limits"
    return f"{text}, {over:.0%} over" if over else text


def harmed(pool: Pool, before_s: Column, after_s: Column, goal: Goal) -> Column | None:
    """How many of those who run on each worker the newcomer will make miss its token limit, as far as can be expected; None:
    nobody anywhere."""
    if not after_s.size or after_s.max() <= goal.gap_s:
        return None
    return np.asarray(pool.running * (_risk(after_s, goal.gap_s) - _risk(before_s, goal.gap_s)))


def _risk(predicted_s: Column, limit_s: float) -> Column:
    """How likely a limit is missed: surely by what is predicted to take twice as long.

    A step at the limit would count those just beyond it as lost and send them everybody else as well; predictions are not that
    good.
    """
    return np.asarray(np.minimum(np.maximum(predicted_s / limit_s - 1.0, 0.0), 1.0))


def _met_there(prefill: Pool, decode: Pool, goal: Goal, wait_s: float) -> Column:
    """The gaps that a newcomer would find on each decode worker, as averages over its life.

    Requests whose prompts are still being computed come one after another, and stay for as long as it does: of `coming` of them
    spread over `spread_s`, at any time as many are there as fit into one life (Little's law). They take the place of those that
    will have ended by then; where fewer are known to come, others will that nobody knows yet, so it stays as full as it is.
    """
    if not decode.coming.max():
        return decode.gap_now_s
    now = decode.running - decode.coming
    life_s = max(goal.output_tokens, 1.0) * decode.gap_of_s(now + 1.0, decode.context)
    spread_s = decode.coming_tokens * prefill.shared_token_s
    left = np.maximum(1.0 - wait_s / life_s, 0.0)
    coming = decode.coming * np.minimum(1.0, life_s / np.maximum(spread_s, 1e-9))
    rows = np.maximum(now, now * left + coming)
    return decode.gap_of_s(rows, decode.context * rows / np.maximum(decode.running, 1.0))


def _missing(harm: Column | None, *predicted: tuple[Column, float]) -> Column | None:
    """Requests expected to miss a limit on each row; None where nobody is."""
    missed = harm
    for predicted_s, limit_s in predicted:
        if predicted_s.max() > limit_s:
            risk = _risk(predicted_s, limit_s)
            missed = risk if missed is None else missed + risk
    return missed


def _best(rows: Rows, missed: Column | None, column: Column) -> list[int]:
    """The LOOKED_AT of these rows where fewest are expected to miss a limit, of those where the column is lowest, that one
    first. By how much a limit is missed grows with the column. Of those that tie, any."""
    kept: list[int] = []
    while rows.size and len(kept) < LOOKED_AT:
        some, room = rows, LOOKED_AT - len(kept)
        if missed is not None and rows.size > 1:
            misses = missed[rows]
            fewest = misses == misses.min()
            some = rows[fewest]
        values, nearest = column[some], some
        if some.size > room:
            near = values <= np.partition(values, room - 1)[room - 1]
            nearest, values = some[near], values[near]
        kept += [row for _, row in sorted(zip(values.tolist(), nearest.tolist(), strict=True))[:room]]
        rows = rows[~fewest] if some.size < min(room, rows.size) else rows[:0]
    return kept
