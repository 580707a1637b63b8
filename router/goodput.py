"""The default policy: keep most requests within their limits. Deciding code.

For every prefill worker the time to the first token is predicted, for every decode worker the gap between tokens once the
request has joined, all in columns. The best few of each are then looked at in pairs, with computing everything on one worker
beside them, for what a column cannot say: how much of the transfer stays exposed, and whom the newcomer pushes over a limit.
(Pairing and exposed transfer after DistServe, section 4, and Mooncake's Conductor; harm to those who run there after Llumnix.)
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from router.baselines import matched_tokens
from router.policy import Candidate, Decision, Need, Pair, Scored, can_place, window_open
from router.pools import Column, Mask, Pool
from router.situation import Situation

BEST_OF_EACH = 8
CHUNK_TOKENS = 256
"""Of chunked prefill beside decodes: what one step adds to a gap."""
NEAR = 0.9
"""Part of a limit that a prediction may fill: predictions err."""


class Forecast(NamedTuple):
    """`step_s` is a gap, `gap_s` with what the hand-off adds to the slowest tenth of gaps, `tpot_s` with what it adds to their
    mean. `harmed`: requests running there that the newcomer pushes over a limit like its own. `standard`: chunk and gap, as
    in `router.calibration.Correction`."""

    pair: Pair
    overhead_s: float
    queue_s: float
    prefill_s: float
    transfer_s: float
    step_s: float
    gap_s: float
    tpot_s: float
    harmed: float
    load: float
    """Ties go to the less loaded."""
    standard: tuple[float, float]

    @property
    def ttft_s(self) -> float:
        return self.overhead_s + self.queue_s + self.prefill_s


class Goodput(Scored):
    wants_keys = True

    def decide(self, situation: Situation, need: Need) -> Decision:
        if need.prefer is not None or not can_place(situation, need):
            fixed = super().decide(situation, need)  # who is preferred, and why nobody
            if not isinstance(fixed.place, Pair) or fixed.place == need.prefer:
                return fixed
        forecasts = [*self._pairs(situation, need), *self._wholes(situation, need)]
        if not forecasts:  # whoever has room must not be asked
            return super().decide(situation, need)
        limits_s = _limits_s(need)
        ranked = sorted(((_rank(forecast, need, limits_s), forecast) for forecast in forecasts), key=lambda pair: pair[0])
        candidates = tuple(_candidate(forecast, rank) for rank, forecast in ranked[:BEST_OF_EACH])
        return Decision(candidates[0].pair, candidates, _why(candidates))

    def _pairs(self, situation: Situation, need: Need) -> list[Forecast]:
        prefill, decode = situation.prefill, situation.decode
        may_prefill = prefill.allowed(need.avoid) & window_open(prefill, need.tokens)
        may_decode = decode.allowed(need.avoid) & _has_room(decode, need)
        if not (may_prefill.any() and may_decode.any()):
            return []
        split = _Split(situation, need)
        first = _best(split.ttft_s, may_prefill)
        then = _best(split.gap_s + 1e-9 * decode.running, may_decode)
        return [split.of(p, d) for p, d in split.best(first, then)]

    def _wholes(self, situation: Situation, need: Need) -> list[Forecast]:
        """Everything on one worker: a colocated one, or a decode worker when its prefill beside decodes harms nobody."""
        forecasts = []
        for pool in (situation.whole, situation.decode):
            if not len(pool):
                continue
            whole = _Whole(situation, pool, need)
            allowed = pool.allowed(need.avoid) & _has_room(pool, need)
            if pool is situation.decode:  # its streams would feel the prompt: only where that is hardly more than a gap
                allowed &= (pool.running == 0) | (pool.cost.prefill_token_s * whole.new <= pool.gap_s())
            total_s = whole.queue_s + whole.prefill_s + need.output_tokens * whole.gap_s
            forecasts += [whole.of(row) for row in _best(total_s, allowed)]
        return forecasts


def forecast(situation: Situation, need: Need, pair: Pair) -> Candidate | None:
    """What is predicted of a place that another policy chose; None when its workers are not in the situation."""
    made = None
    if pair.prefill is not None:
        p, d = situation.prefill.row.get(pair.prefill), situation.decode.row.get(pair.decode)
        made = _Split(situation, need).of(p, d) if p is not None and d is not None else None
    else:
        for pool in (situation.whole, situation.decode):
            if made is None and (row := pool.row.get(pair.decode)) is not None:
                made = _Whole(situation, pool, need).of(row)
    return _candidate(made, _rank(made, need, _limits_s(need))) if made is not None else None


class _Split:
    """Prefill and decode on two workers: columns of either pool, then any pair of rows exactly."""

    def __init__(self, situation: Situation, need: Need) -> None:
        self._prefill, self._decode, self._need = situation.prefill, situation.decode, need
        self._token_bytes, self._link = situation.token_bytes, situation.view.link
        cached = matched_tokens(situation, self._prefill, need)
        self._new = need.tokens - cached
        self.queue_s = self._prefill.queue_s(need.now)
        self.prefill_s = self._prefill.prefill_s(self._new, cached)
        self.ttft_s = self._prefill.corrections.overhead_s + self.queue_s + self.prefill_s
        rows, context = _met_there(situation, need, float((self.queue_s + self.prefill_s).min()))
        self.gap_s = self._decode.gap_of_s(rows + 1.0, context + need.tokens + need.output_tokens / 2)
        self._harmed = _harmed(self._decode, self._decode.gap_of_s(rows, context), self.gap_s, need)

    def best(self, first: list[int], then: list[int]) -> list[tuple[int, int]]:
        """Of all pairs of these rows the BEST_OF_EACH that `_rank` puts first, in columns: making each of them costs more."""
        need, p, d = self._need, np.array(first, dtype=np.int64), np.array(then, dtype=np.int64)[:, None]
        ttft_s = self.ttft_s[p]
        exposed_s = self._link.latency_s + np.minimum(self._new[p], CHUNK_TOKENS) * self._token_bytes / self._link.bytes_per_s
        exposed_s = exposed_s + self._decode.corrections.join_s[d]
        gap_s = self.gap_s[d] + exposed_s / max(1.0, need.output_tokens / 10)
        missed, over = self._harmed[d] + np.zeros(p.size), np.zeros(gap_s.shape)
        for predicted_s, limit_s in zip((ttft_s, gap_s), _limits_s(need), strict=True):
            if limit_s is not None:
                missed += predicted_s > limit_s
                over += np.maximum(predicted_s / limit_s - 1, 0.0)
        total_s = ttft_s + need.output_tokens * gap_s
        load = self._prefill.waiting_tokens[p] + self._decode.running[d]
        order = np.lexsort((load.ravel(), total_s.ravel(), over.ravel(), missed.ravel()))[:BEST_OF_EACH]
        return [(first[n % p.size], then[n // p.size]) for n in order.tolist()]

    def of(self, p: int, d: int) -> Forecast:
        prefill, decode, need = self._prefill, self._decode, self._need
        last_chunk = min(float(self._new[p]), CHUNK_TOKENS)
        exposed_s = self._link.latency_s + last_chunk * self._token_bytes / self._link.bytes_per_s
        exposed_s += float(decode.corrections.join_s[d])
        step_s = float(self.gap_s[d])
        return Forecast(
            Pair(prefill.names[p], decode.names[d]),
            float(prefill.corrections.overhead_s[p]),
            float(self.queue_s[p]),
            float(self.prefill_s[p]),
            exposed_s,
            step_s,
            step_s + exposed_s / max(1.0, need.output_tokens / 10),  # one of the slowest tenth of gaps
            step_s + exposed_s / max(1.0, need.output_tokens - 1.0),
            float(self._harmed[d]),
            float(prefill.waiting_tokens[p] + decode.running[d]),
            (float(prefill.standard_chunk_s[p]), float(decode.standard_gap_s[d])),
        )


def _met_there(situation: Situation, need: Need, wait_s: float) -> tuple[Column, Column]:
    """Requests that a newcomer decodes beside on each decode worker, and the context they hold, as averages over its life.

    Those whose prompts are still being computed come one after another, and stay for as long as it does: of `coming` of them
    spread over `spread_s`, at any time as many are there as fit into one life (Little's law). They take the place of those that
    will have ended by then; where fewer are known to come, others will that nobody knows yet, so it stays as full as it is.
    """
    prefill, decode = situation.prefill, situation.decode
    now = decode.running - decode.coming
    life_s = np.maximum(need.output_tokens, 1.0) * decode.gap_of_s(now + 1.0, decode.context)
    spread_s = decode.coming_tokens * float(prefill.cost.prefill_token_s.mean()) / len(prefill)
    left = np.clip(1.0 - wait_s / life_s, 0.0, 1.0)
    coming = decode.coming * np.minimum(1.0, life_s / np.maximum(spread_s, 1e-9))
    rows = np.maximum(now, now * left + coming)
    return rows, decode.context * rows / np.maximum(decode.running, 1.0)


class _Whole:
    """Everything on one worker of `pool`, beside what decodes there."""

    def __init__(self, situation: Situation, pool: Pool, need: Need) -> None:
        self._pool = pool
        cached = matched_tokens(situation, pool, need)
        self.new = need.tokens - cached
        chunk = np.minimum(self.new, CHUNK_TOKENS)
        steps = np.ceil((self.new + pool.waiting_tokens) / CHUNK_TOKENS)
        self.queue_s = pool.queue_s(need.now)
        self.prefill_s = pool.prefill_s(self.new, cached) + steps * (pool.gap_s() - pool.cost.base_s)  # decodes run along
        self.gap_s = pool.gap_s(1.0, need.tokens + need.output_tokens / 2)
        felt_s = pool.gap_s() + pool.cost.prefill_token_s * chunk
        self._harmed = np.where(pool.running > 0, _harmed(pool, pool.gap_s(), felt_s, need), 0.0)

    def of(self, row: int) -> Forecast:
        pool, gap_s = self._pool, float(self.gap_s[row])
        return Forecast(
            Pair(None, pool.names[row]),
            float(pool.corrections.overhead_s[row]),
            float(self.queue_s[row]),
            float(self.prefill_s[row]),
            0.0,
            gap_s,
            gap_s,
            gap_s,
            float(self._harmed[row]),
            float(pool.waiting_tokens[row] + pool.running[row]),
            (float(pool.standard_chunk_s[row]), float(pool.standard_gap_s[row])),
        )


def _harmed(pool: Pool, before_s: Column, after_s: Column, need: Need) -> Column:
    """Who runs on each worker and would keep the newcomer's token limit without it but not with it."""
    limit_s = _gap_limit_s(need)
    if limit_s is None:
        return np.zeros(len(pool))
    return np.where((before_s <= limit_s) & (after_s > limit_s), pool.running, 0.0)


def _has_room(pool: Pool, need: Need) -> Mask:
    """Where prompt and answer fit; when they fit nowhere, everywhere: the worker itself has the last word."""
    fits = pool.room_blocks * pool.block_tokens >= need.tokens + need.output_tokens
    return fits if fits.any() else np.ones(len(pool), dtype=np.bool_)


def _best(score: Column, mask: Mask) -> list[int]:
    rows = np.flatnonzero(mask)
    if rows.size > BEST_OF_EACH:
        rows = rows[np.argpartition(score[rows], BEST_OF_EACH - 1)[:BEST_OF_EACH]]
    return sorted(rows.tolist())  # ties go by name


def _gap_limit_s(need: Need) -> float | None:
    limits = [limit for limit in (need.slo.tbt_s, need.slo.tpot_s) if limit is not None]
    return NEAR * min(limits) if limits else None


def _limits_s(need: Need) -> tuple[float | None, float | None]:
    """What a prediction of the first token and one of gaps may be."""
    return need.slo.ttft_s and NEAR * need.slo.ttft_s, _gap_limit_s(need)


_Rank = tuple[float, float, float, float, str]


def _rank(forecast: Forecast, need: Need, limits_s: tuple[float | None, float | None]) -> _Rank:
    """Requests that miss a limit, then by how much this one does, then the time until its last token."""
    over = 0.0
    missed = forecast.harmed
    for predicted_s, limit_s in zip((forecast.ttft_s, forecast.gap_s), limits_s, strict=True):
        if limit_s is not None and predicted_s > limit_s:
            missed += 1
            over += predicted_s / limit_s - 1
    total_s = forecast.ttft_s + need.output_tokens * forecast.gap_s
    return (missed, over, total_s, forecast.load, forecast.pair.decode + (forecast.pair.prefill or ""))


def _candidate(forecast: Forecast, rank: _Rank) -> Candidate:
    missed, over, total_s, *_ = rank
    reason = f"misses {missed:g}" if missed else "within limits"
    return Candidate(
        forecast.pair,
        forecast.ttft_s,
        forecast.gap_s,
        total_s,
        f"{reason}, {over:.0%} over" if over else reason,
        overhead_s=forecast.overhead_s,
        queue_s=forecast.queue_s,
        prefill_s=forecast.prefill_s,
        transfer_s=forecast.transfer_s,
        tpot_s=forecast.tpot_s,
        step_s=forecast.step_s,
        standard_chunk_s=forecast.standard[0],
        standard_gap_s=forecast.standard[1],
    )


def _why(candidates: tuple[Candidate, ...]) -> str:
    """The best one against the next."""
    best, *others = candidates
    if not others:
        return f"the only place; {best.reason}"
    if best.reason != others[0].reason:
        return f"{best.reason}; the next one {others[0].reason}"
    sooner_ms = (others[0].score - best.score) * 1e3
    return f"{best.reason}; its last token {sooner_ms:.0f} ms before that of the next one"
