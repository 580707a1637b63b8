"""The default policy: keep most requests within their limits. Deciding code.

For every prefill worker the time to the first token is predicted, for every decode worker the gap between tokens once the
request has joined, all in columns (`router.forecast`), and whom the newcomer pushes over a limit. The best few pairs are then
looked at one by one, with computing everything on one worker beside them.
(Pairing and exposed transfer after DistServe, section 4, and Mooncake's Conductor; harm to those who run there after Llumnix.)
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter

import numpy as np

from router.forecast import Ranked, Split, Whole
from router.patience import CROWDED, WAITS, begins_s, calm, crowded, filled, has_room, in_a_lull, is_late
from router.policy import Candidate, Decision, Need, Pair, Scored, window_open
from router.pools import HALF, Mask, Pool, Rows
from router.ranking import Goal
from router.situation import Situation

KEPT = 4
"""Candidates of a decision."""


class Goodput(Scored):
    wants_keys = True

    def begins_s(self, situation: Situation, now: float) -> Sequence[float]:
        return begins_s(situation, now) if situation.costs_known else ()

    def decide(self, situation: Situation, need: Need) -> Decision:
        patient = need.may_wait and situation.costs_known
        prefill, decode, whole = situation.prefill, situation.decode, situation.whole
        may_prefill, may_whole = prefill.allowed(need.avoid), whole.allowed(need.avoid)
        decodes = decode.rows(need.avoid)
        if patient:
            prefills, wholes = _rows(may_prefill & has_room(prefill, need)), _rows(may_whole & has_room(whole, need))
        else:
            prefills, wholes = _rows(may_prefill & window_open(prefill, need.tokens)), _rows(may_whole)
        if need.prefer is not None or not (wholes.size or (prefills.size and decodes.size)):
            if patient and (may_whole.any() or (may_prefill.any() and decodes.size)):
                return Decision(filled(prefill, may_prefill, whole, may_whole, need.now))
            fixed = super().decide(situation, need)  # who is preferred, and why nobody
            if not isinstance(fixed.place, Pair) or fixed.place == need.prefer:
                return fixed
        places = _Places(situation, need, _with_room(decode, decodes, need), _with_room(whole, wholes, need))
        late = patient and is_late(places.soonest_s(prefills), need)
        ranked = [] if late else places.ranked(prefills)
        if not late:
            if not ranked:  # whoever has room must not be asked
                return super().decide(situation, need)
            late = patient and is_late(ranked[0].ttft_s(), need)
        if late:
            ranked = places.ranked(calm(prefill, prefills, need), hurried=False)
            if not ranked or not in_a_lull(ranked[0]):
                return Decision(WAITS)
        best = ranked[0].candidate()
        if patient and crowded(ranked[0], best, need):
            return Decision(WAITS if late else CROWDED)
        candidates = (best, *(one.candidate() for one in ranked[1:KEPT]))
        return Decision(best.pair, candidates, _why(candidates))


class _Places:
    """Where one request may go, with what is predicted of it: of each kind of placement when it is first looked at."""

    def __init__(self, situation: Situation, need: Need, decodes: Rows, wholes: Rows) -> None:
        self._situation, self._need, self._goal = situation, need, Goal.of(need)
        self._decodes, self._wholes = decodes, wholes
        self._idle = decodes[situation.decode.waiting_tokens[decodes] == 0]  # of those that decode
        self._split: Split | None = None
        self._whole: Whole | None = None
        self._straight: Whole | None = None

    def soonest_s(self, prefills: Rows) -> float:
        """No first token comes sooner; 0 where that takes a closer look."""
        closer = self._wholes.size or self._idle.size or not prefills.size or not self._decodes.size
        return 0.0 if closer else self._split_on().soonest_s(prefills)

    def ranked(self, prefills: Rows, *, hurried: bool = True) -> list[Ranked]:
        """Placements on these rows, the best one first. Not `hurried`: without the limit of the first token."""
        goal = self._goal if hurried else self._goal.unhurried()
        ranked: list[Ranked] = []
        if prefills.size and self._decodes.size:
            ranked += self._split_on().best(prefills, self._decodes, goal)
        if self._wholes.size:
            if self._whole is None:
                self._whole = Whole(self._situation, self._situation.whole, self._need, self._goal)
            ranked += self._whole.best(self._wholes, goal)
        if self._idle.size:
            if self._straight is None:
                self._straight = Whole(self._situation, self._situation.decode, self._need, self._goal)
            ranked += self._straight.best(_unfelt(self._straight, self._situation.decode, self._idle, ranked), goal)
        ranked.sort(key=itemgetter(0))
        return ranked

    def _split_on(self) -> Split:
        if self._split is None:
            self._split = Split(self._situation, self._situation.prefill, self._situation.decode, self._need, self._goal)
        return self._split


def _rows(mask: Mask) -> Rows:
    return mask.nonzero()[0]


def _with_room(pool: Pool, rows: Rows, need: Need) -> Rows:
    """Where prompt and answer fit; when they fit nowhere, everywhere: the worker itself has the last word."""
    if not rows.size:
        return rows
    fits = pool.room_tokens >= np.float64(need.tokens + need.output_tokens)
    fitting = rows[fits[rows]]
    return fitting if fitting.size or np.count_nonzero(fits) else rows


def _unfelt(straight: Whole, decode: Pool, rows: Rows, others: list[Ranked]) -> Rows:
    """Of these decode workers, which have no prompts, those that may compute the whole request. Streams would feel it: it must
    be hardly more than a gap. Where none run, whoever comes next finds the worker busy: so only when the best of the others
    keeps it waiting or computes more of it, and only what is short (no more than handing it over) or mostly cached, unless a
    limit is at risk everywhere else. None of those that cannot be quicker than the best of the others, if that harms nobody."""
    best = min(others, key=itemgetter(0), default=None)
    computing_s = decode.cost.prefill_token_s * straight.new
    if best is None or best.rank[0]:
        worth = np.ones(len(decode), np.bool_)
    else:
        worth = (computing_s <= straight.handing_over_s()) | (straight.new <= HALF * straight.tokens)
        worth &= (straight.new < np.float64(best.computes())) | (best.candidate().queue_s > 0)
    may = np.where(decode.running <= decode.coming, worth, computing_s <= decode.gap_now_s)
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
