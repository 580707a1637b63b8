"""The default policy: keep most requests within their limits. Deciding code.

For every prefill worker the time to the first token is predicted, for every decode worker the gap between tokens once the
request has joined, all in columns (`router.forecast`), and whom the newcomer pushes over a limit. The best few pairs are then
looked at one by one, with computing everything on one worker beside them.
(Pairing and exposed transfer after DistServe, section 4, and Mooncake's Conductor; harm to those who run there after Llumnix.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from operator import itemgetter

import numpy as np

from router.early_rejection import costs_known
from router.forecast import Goal, Ranked, Split, Whole
from router.patience import CROWDED, WAITS, begins_s, calm, crowded, filled, has_room, in_a_lull, is_late
from router.policy import Candidate, Decision, Need, Pair, Scored, window_open
from router.pools import Mask, Pool, Rows
from router.situation import Situation

KEPT = 4
"""Candidates of a decision."""


class Goodput(Scored):
    wants_keys = True

    def begins_s(self, situation: Situation, now: float) -> Sequence[float]:
        return begins_s(situation, now) if costs_known(situation) else ()

    def decide(self, situation: Situation, need: Need) -> Decision:
        patient = need.may_wait and costs_known(situation)
        prefill, decode, whole = situation.prefill, situation.decode, situation.whole
        may_prefill, may_decode, may_whole = (pool.allowed(need.avoid) for pool in (prefill, decode, whole))
        if patient:
            prefills, wholes = _rows(may_prefill & has_room(prefill, need)), may_whole & has_room(whole, need)
        else:
            prefills, wholes = _rows(may_prefill & window_open(prefill, need.tokens)), may_whole
        pairs = bool(prefills.size and may_decode.any())
        if need.prefer is not None or not (pairs or wholes.any()):
            if patient and (may_whole.any() or (may_prefill.any() and may_decode.any())):
                return Decision(filled(prefill, may_prefill, whole, may_whole, need.now))
            fixed = super().decide(situation, need)  # who is preferred, and why nobody
            if not isinstance(fixed.place, Pair) or fixed.place == need.prefer:
                return fixed
        decodes = _with_room(decode, may_decode, need)
        ranked = _ranked(situation, need, prefills if pairs else prefills[:0], decodes, _with_room(whole, wholes, need))
        if not ranked:  # whoever has room must not be asked
            return super().decide(situation, need)
        if patient:
            late = is_late(ranked[0].candidate(), need)
            if late:
                unhurried = replace(need, slo=replace(need.slo, ttft_s=None))
                ranked = _ranked(situation, unhurried, calm(prefill, prefills, need), decodes, _with_room(whole, wholes, need))
                if not ranked or not in_a_lull(ranked[0]):
                    return Decision(WAITS)
            if crowded(ranked[0], need):
                return Decision(WAITS if late else CROWDED)
        candidates = tuple(one.candidate() for one in ranked[:KEPT])
        return Decision(candidates[0].pair, candidates, _why(candidates))


def _ranked(situation: Situation, need: Need, prefills: Rows, decodes: Rows, wholes: Rows) -> list[Ranked]:
    """Placements on these rows, the best one first."""
    prefill, decode, whole = situation.prefill, situation.decode, situation.whole
    goal = Goal.of(need)
    ranked: list[Ranked] = []
    if prefills.size and decodes.size:
        ranked += Split(situation, prefill, decode, need, goal).best(prefills, decodes)
    if len(whole):
        ranked += Whole(situation, whole, need, goal).best(wholes)
    if decodes.size:
        straight = Whole(situation, decode, need, goal)
        ranked += straight.best(_unfelt(straight, decode, decodes, ranked))
    ranked.sort(key=itemgetter(0))
    return ranked


def _rows(mask: Mask) -> Rows:
    return mask.nonzero()[0]


def _with_room(pool: Pool, may: Mask, need: Need) -> Rows:
    """Where prompt and answer fit; when they fit nowhere, everywhere: the worker itself has the last word."""
    fits = pool.room_tokens >= need.tokens + need.output_tokens
    rows = _rows(may & fits)
    return rows if rows.size or fits.any() else _rows(may)


def _unfelt(straight: Whole, decode: Pool, rows: Rows, others: list[Ranked]) -> Rows:
    """Decode workers that may compute the whole request. Streams would feel it: it must be hardly more than a gap. Where none
    run, whoever comes next finds the worker busy: so only when the best of the others keeps it waiting or computes more of it,
    and only what is short (no more than handing it over) or mostly cached, unless a limit is at risk everywhere else. None of
    those that cannot be quicker than the best of the others, if that harms nobody."""
    best = min(others, key=itemgetter(0), default=None)
    computing_s = decode.cost.prefill_token_s * straight.new
    if best is None or best.rank[0]:
        worth = np.ones(len(decode), np.bool_)
    else:
        worth = (computing_s <= straight.handing_over_s()) | (2 * straight.new <= straight.tokens)
        worth &= (straight.new < best.computes()) | (best.candidate().queue_s > 0)
    may = decode.waiting_tokens == 0
    may &= np.where(decode.running <= decode.coming, worth, computing_s <= decode.gap_now_s)
    rows = rows[may[rows]]
    if rows.size and best is not None and not best.rank[0]:
        rows = rows[straight.at_best_s()[rows] <= best.rank[2]]
    return rows


def _why(candidates: tuple[Candidate, ...]) -> str:
    """The best one against the next."""
    best, *others = candidates
    if not others:
        return f"the only place; {best.reason}"
    if best.reason != others[0].reason:
        return f"{best.reason}; the next one {others[0].reason}"
    sooner_ms = (others[0].score - best.score) * 1e3
    return f"{best.reason}; its last token {sooner_ms:.0f} ms before that of the next one"
