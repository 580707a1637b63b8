"""The default policy: keep most requests within their limits. Deciding code.

For every prefill worker the time to the first token is predicted, for every decode worker the gap between tokens once the
request has joined, all in columns (`router.forecast`), and whom the newcomer pushes over a limit. The best few pairs are then
looked at one by one, with computing everything on one worker beside them.
(Pairing and exposed transfer after DistServe, section 4, and Mooncake's Conductor; harm to those who run there after Llumnix.)
"""

from __future__ import annotations

from operator import itemgetter

from router.forecast import Goal, Ranked, Split, Whole
from router.policy import Candidate, Decision, Need, Pair, Scored, window_open
from router.pools import Mask, Pool, Rows
from router.situation import Situation

KEPT = 4
"""Candidates of a decision."""


class Goodput(Scored):
    wants_keys = True

    def decide(self, situation: Situation, need: Need) -> Decision:
        prefill, decode, whole = situation.prefill, situation.decode, situation.whole
        prefills = _rows(prefill.allowed(need.avoid) & window_open(prefill, need.tokens))
        may_decode, may_whole = decode.allowed(need.avoid), whole.allowed(need.avoid)
        pairs = bool(prefills.size and may_decode.any())
        if need.prefer is not None or not (pairs or may_whole.any()):
            fixed = super().decide(situation, need)  # who is preferred, and why nobody
            if not isinstance(fixed.place, Pair) or fixed.place == need.prefer:
                return fixed
        goal = Goal.of(need)
        ranked: list[Ranked] = []
        decodes = _with_room(decode, may_decode, need)
        if pairs and decodes.size:
            ranked += Split(situation, prefill, decode, need, goal).best(prefills, decodes)
        if len(whole):
            ranked += Whole(situation, whole, need, goal).best(_with_room(whole, may_whole, need))
        if decodes.size:
            straight = Whole(situation, decode, need, goal)
            ranked += straight.best(_unfelt(straight, decode, decodes, ranked))
        if not ranked:  # whoever has room must not be asked
            return super().decide(situation, need)
        ranked.sort(key=itemgetter(0))
        candidates = tuple(one.candidate() for one in ranked[:KEPT])
        return Decision(candidates[0].pair, candidates, _why(candidates))


def _rows(mask: Mask) -> Rows:
    return mask.nonzero()[0]


def _with_room(pool: Pool, may: Mask, need: Need) -> Rows:
    """Where prompt and answer fit; when they fit nowhere, everywhere: the worker itself has the last word."""
    fits = pool.room_tokens >= need.tokens + need.output_tokens
    rows = _rows(may & fits)
    return rows if rows.size or fits.any() else _rows(may)


def _unfelt(straight: Whole, decode: Pool, rows: Rows, others: list[Ranked]) -> Rows:
    """Decode workers that may compute the whole request: their streams would feel the prompt, so only where that is hardly more
    than a gap. None of those that cannot be quicker than the best of the others, if that harms nobody."""
    may = (decode.running == 0) | (decode.cost.prefill_token_s * straight.new <= decode.gap_now_s)
    rows = rows[may[rows]]
    if rows.size and others:
        best = min(others, key=itemgetter(0))
        if not best.rank[0]:
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
