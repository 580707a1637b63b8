"""What is predicted of one place that was chosen already: `router.forecast`, number by number instead of in columns.

A column of one element takes as long as one of a thousand; who predicts for a single pair does without. Deciding code.
"""

from __future__ import annotations

from math import ceil

from router.forecast_columns import ASKING_S, CHUNK_TOKENS
from router.policy import Candidate, Need, Pair
from router.pools import Pool
from router.ranking import Goal, rank_of, reason_of
from router.situation import Situation


def forecast(situation: Situation, need: Need, pair: Pair) -> Candidate | None:
    """What is predicted of a place that another policy chose; None when its workers are not in the situation."""
    if pair.prefill is not None:
        p, d = situation.prefill.row.get(pair.prefill), situation.decode.row.get(pair.decode)
        return _split(situation, need, p, d) if p is not None and d is not None else None
    for pool in (situation.whole, situation.decode):
        row = pool.row.get(pair.decode)
        if row is not None:
            return _whole(situation, pool, need, row)
    return None


def _split(situation: Situation, need: Need, p: int, d: int) -> Candidate:
    """As `router.forecast.Split`."""
    goal, prefill, decode, link = Goal.of(need), situation.prefill, situation.decode, situation.view.link
    new, queue_s, prefill_s = _prompt(situation, prefill, need, p)
    overhead_s = prefill.corrections.overhead_s.item(p)
    ttft_s = overhead_s + (queue_s + prefill_s)
    before_s = _met_there(prefill, decode, goal, queue_s + prefill_s, d)
    more_s = decode.cost.decode_context_s.item(d) * (need.tokens + need.output_tokens / 2)
    step_s = before_s + decode.cost.decode_row_s.item(d) + more_s
    harm, join_s = _harm(decode, before_s, step_s, goal, d), decode.corrections.join_s.item(d)
    exposed_s = link.latency_s + min(new, CHUNK_TOKENS) * (situation.token_bytes / link.bytes_per_s)
    late_s = exposed_s + join_s
    rank = rank_of(goal, harm, ttft_s, step_s + goal.tenth * join_s + goal.tenth * exposed_s, 0.0, "")
    return Candidate(
        Pair(prefill.names[p], decode.names[d]),
        ttft_s,
        step_s + goal.tenth * late_s,
        rank[2],
        reason_of(rank),
        overhead_s=overhead_s,
        queue_s=queue_s,
        prefill_s=prefill_s,
        transfer_s=late_s,
        tpot_s=step_s + late_s / max(1.0, goal.output_tokens - 1.0),
        step_s=step_s,
        standard_chunk_s=prefill.standard_chunk_s.item(p),
        standard_gap_s=decode.standard_gap_s.item(d),
    )


def _whole(situation: Situation, pool: Pool, need: Need, row: int) -> Candidate:
    """As `router.forecast.Whole`."""
    goal, cost, now_s = Goal.of(need), pool.cost, pool.gap_now_s.item(row)
    new, queue_s, alone_s = _prompt(situation, pool, need, row)
    steps = ceil((new + pool.waiting_tokens.item(row)) / CHUNK_TOKENS)
    prefill_s = alone_s + steps * (now_s - cost.base_s.item(row))
    overhead_s, running = pool.corrections.overhead_s.item(row), pool.running.item(row)
    ttft_s = overhead_s + (0.5 * now_s if running > 0 else 0.0) + queue_s + prefill_s
    context = pool.context.item(row) + (need.tokens + need.output_tokens / 2)
    gap_s = cost.base_s.item(row) + cost.decode_row_s.item(row) * (running + 1.0) + cost.decode_context_s.item(row) * context
    felt_s = now_s + cost.prefill_token_s.item(row) * min(new, CHUNK_TOKENS)
    rank = rank_of(goal, _harm(pool, now_s, felt_s, goal, row), ttft_s, gap_s, 0.0, "")
    return Candidate(
        Pair(None, pool.names[row]),
        ttft_s,
        gap_s,
        rank[2],
        reason_of(rank),
        overhead_s=overhead_s,
        queue_s=queue_s,
        prefill_s=prefill_s,
        tpot_s=gap_s,
        step_s=gap_s,
        standard_chunk_s=pool.standard_chunk_s.item(row),
        standard_gap_s=pool.standard_gap_s.item(row),
    )


def _prompt(situation: Situation, pool: Pool, need: Need, row: int) -> tuple[float, float, float]:
    """Tokens to compute, the time until that begins, and what it takes."""
    cached = 0.0
    if situation.index is not None and need.keys:
        blocks = situation.cached_blocks(pool, need.keys).item(row)
        cached = min(blocks * pool.block_tokens.item(row), float(max(need.tokens - 1, 0)))
    new, queue_s = need.tokens - cached, pool.queue_of_s(row, need.now)
    prefill_s = pool.prefill_of_s(row, new, cached)
    best = situation.best_tokens(need.keys, need.tokens)
    if best <= cached:
        return new, queue_s, prefill_s
    link = situation.view.link
    fetch_s = ASKING_S + link.latency_s + (best - cached) * (situation.token_bytes / link.bytes_per_s)
    begins_s, rest_s = max(queue_s, fetch_s), pool.prefill_of_s(row, float(need.tokens - best), float(best))
    sooner = begins_s + rest_s < queue_s + prefill_s
    return (float(need.tokens - best), begins_s, rest_s) if sooner else (new, queue_s, prefill_s)


def _met_there(prefill: Pool, decode: Pool, goal: Goal, wait_s: float, row: int) -> float:
    """As `router.forecast_columns.met_there`."""
    coming = decode.coming.item(row)
    if not coming:
        return decode.gap_now_s.item(row)
    running, context, cost = decode.running.item(row), decode.context.item(row), decode.cost
    base_s, row_s, context_s = cost.base_s.item(row), cost.decode_row_s.item(row), cost.decode_context_s.item(row)
    now = running - coming
    life_s = max(goal.output_tokens, 1.0) * (base_s + row_s * (now + 1.0) + context_s * context)
    spread_s = decode.coming_tokens.item(row) * prefill.shared_token_s
    left = max(1.0 - wait_s / max(life_s, 1e-12), 0.0)
    rows = max(now, now * left + coming * min(1.0, life_s / max(spread_s, 1e-9)))
    return float(base_s + row_s * rows + context_s * (context * rows / max(running, 1.0)))


def _harm(pool: Pool, before_s: float, after_s: float, goal: Goal, row: int) -> float:
    """As `router.forecast_columns.harmed`."""
    if after_s <= goal.gap_s:
        return 0.0
    return float(pool.running.item(row) * (_risk(after_s, goal.gap_s) - _risk(before_s, goal.gap_s)))


def _risk(predicted_s: float, limit_s: float) -> float:
    return min(max(predicted_s / limit_s - 1.0, 0.0), 1.0)
