"""The steps of a forecast, each over all workers of a pool at once: a column has an element per worker. Deciding code."""

from __future__ import annotations

import numpy as np

from router.cost_columns import Column
from router.policy import Need
from router.pools import ONE, ZERO, Pool, Rows
from router.ranking import Goal
from router.situation import Situation

LOOKED_AT = 4
"""Rows of a pool that are ranked exactly."""
CHUNK_TOKENS = 256
"""Of chunked prefill beside decodes: what one step adds to a gap."""
ASKING_S = 2e-3
"""Finding out who has the blocks of a prompt."""
_MOMENT_S = np.float64(1e-9)


def prompt_columns(situation: Situation, pool: Pool, need: Need, cached: Column) -> tuple[Column, Column, Column]:
    """On each worker the tokens to compute, the time until it begins with them, and what they take it.

    With what the worker has of the prompt, or with the longest prefix that anybody has, fetched while others are computed,
    whichever is sooner (Mooncake's Conductor, FAST '25, algorithm 1, with times for its hand-tuned ratio: a prefix is
    replicated where waiting for its holder takes longer).
    """
    new, queue_s = np.float64(need.tokens) - cached, pool.queue_s(need.now)
    prefill_s = pool.prefill_s(new, cached)
    best = situation.best_tokens(need.keys, need.tokens)
    if not cached.size or best <= lowest(cached):
        return new, queue_s, prefill_s
    link = situation.view.link
    longest, rest, token_s = np.float64(best), np.float64(need.tokens - best), situation.token_bytes / link.bytes_per_s
    fetch_s = np.float64(ASKING_S + link.latency_s) + (longest - cached) * np.float64(token_s)
    begins_s, rest_s = np.maximum(queue_s, fetch_s), pool.prefill_s(rest, longest)
    sooner = (begins_s + rest_s < queue_s + prefill_s) & (cached < longest)
    if not np.count_nonzero(sooner):
        return new, queue_s, prefill_s
    return (
        np.where(sooner, rest, new),
        np.where(sooner, begins_s, queue_s),
        np.where(sooner, rest_s, prefill_s),
    )


def harmed(pool: Pool, before_s: Column, after_s: Column, goal: Goal) -> Column | None:
    """How many of those who run on each worker the newcomer will make miss its token limit, as far as can be expected; None:
    nobody anywhere."""
    if not after_s.size or highest(after_s) <= goal.gap_s:
        return None
    return np.asarray(pool.running * (_risk(after_s, goal.gap_s) - _risk(before_s, goal.gap_s)))


def _risk(predicted_s: Column, limit_s: float) -> Column:
    """How likely a limit is missed: surely by what is predicted to take twice as long.

    A step at the limit would count those just beyond it as lost and send them everybody else as well; predictions are not that
    good.
    """
    risk: Column = predicted_s / np.float64(limit_s)
    risk -= ONE
    np.maximum(risk, ZERO, out=risk)
    np.minimum(risk, ONE, out=risk)
    return risk


def met_there(prefill: Pool, decode: Pool, goal: Goal, wait_s: float) -> Column:
    """The gaps that a newcomer would find on each decode worker, as averages over its life.

    Requests whose prompts are still being computed come one after another, and stay for as long as it does: of `coming` of them
    spread over `spread_s`, at any time as many are there as fit into one life (Little's law). They take the place of those that
    will have ended by then; where fewer are known to come, others will that nobody knows yet, so it stays as full as it is.
    """
    if not highest(decode.coming):
        return decode.gap_now_s
    now, life_s = decode.decoding, decode.gap_joined_s * np.float64(max(goal.output_tokens, 1.0))
    spread_s = np.maximum(decode.coming_tokens * np.float64(prefill.shared_token_s), _MOMENT_S)
    left = np.maximum(ONE - np.float64(wait_s) / life_s, ZERO)
    coming = decode.coming * np.minimum(life_s / spread_s, ONE)
    rows = np.maximum(now, now * left + coming)
    return decode.gap_of_s(rows, decode.context * rows / np.maximum(decode.running, ONE))


def missing(harm: Column | None, *predicted: tuple[Column, float]) -> Column | None:
    """Requests expected to miss a limit on each row; None where nobody is."""
    missed = harm
    for predicted_s, limit_s in predicted:
        if highest(predicted_s) > limit_s:
            risk = _risk(predicted_s, limit_s)
            missed = risk if missed is None else missed + risk
    return missed


def best_rows(rows: Rows, missed: Column | None, column: Column) -> list[int]:
    """The LOOKED_AT of these rows where fewest are expected to miss a limit, of those where the column is lowest, that one
    first. By how much a limit is missed grows with the column. Of those that tie, any."""
    sure = rows[:0]
    if missed is not None and rows.size > LOOKED_AT:
        misses = missed[rows]
        last = np.partition(misses, LOOKED_AT - 1)[LOOKED_AT - 1]
        sure, rows = rows[misses < last], rows[misses == last]
    room = LOOKED_AT - sure.size
    if rows.size > room:
        values = column[rows]
        rows = rows[values <= np.partition(values, room - 1)[room - 1]]
    some = [*sure.tolist(), *rows.tolist()]
    if missed is None:
        return sorted(some, key=lambda row: (column.item(row), row))[:LOOKED_AT]
    return sorted(some, key=lambda row: (missed.item(row), column.item(row), row))[:LOOKED_AT]


def lowest(column: Column) -> float:
    """As `column.min()`, in a third of the time. Not empty."""
    return column.item(column.argmin())


def highest(column: Column) -> float:
    return column.item(column.argmax())
