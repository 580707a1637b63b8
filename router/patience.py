"""When to keep a request although there is room: what `goodput` knows beyond choosing. Deciding code.

A prompt that is sent ahead is computed in its turn, whoever comes meanwhile; while it waits at the router, others may still go
before it. So a worker gets the next prompt when it has less than a step of them left. A request that nobody can serve within
its limits any more, and one that would push everybody's gaps over theirs, is lost or makes others be: it waits for a lull.
"""

from __future__ import annotations

import math

import numpy as np

from router.forecast import Ranked, Split
from router.policy import Candidate, Need, Nobody
from router.pools import Mask, Pool, Rows
from router.situation import Situation

CALM_S = 1e-3
"""Left to compute where a prompt may be sent that can keep no limit."""
GAP_FILLED = 0.96
"""Part of its limit that a predicted gap may fill. While too many come, gaps are always as long as this allows, so above one
everybody would miss the limit; a little below, because predictions err."""
TOO_LATE = 1.15
"""Times its limit that a first token must be predicted to take for the request to count as lost: predictions err."""
OUT_OF_TIME_S = 2e-3
"""Of a limit; whose limit has passed is said to have a millisecond left (`router.placing`)."""
SOON_S = 2e-3
_NOWHERE = np.zeros(0, dtype=np.bool_)
LULL_S = 0.05
"""After how long to look again, at least; for a lull, which mostly comes when somebody ends."""


def has_room(pool: Pool, need: Need) -> Mask:
    """Where there is less than a step of prompts left to compute."""
    if not len(pool):
        return _NOWHERE
    return np.asarray((pool.prefills == 0) | (pool.queue_s(need.now) <= pool.ahead_s))


def room_in_s(pools: list[tuple[Pool, Mask]], now: float) -> float:
    """Until one of the allowed workers has."""
    left = [(pool.queue_s(now) - pool.ahead_s)[may].min() for pool, may in pools if may.any()]
    soonest_s = float(min(left, default=LULL_S))
    return max(soonest_s, SOON_S) if math.isfinite(soonest_s) else LULL_S


def is_late(ttft_s: float, need: Need) -> bool:
    """Whether its first token will come after its limit, when it comes so late at the best place."""
    return need.slo.ttft_s is not None and ttft_s > max(TOO_LATE * need.slo.ttft_s, OUT_OF_TIME_S)


def calm(prefill: Pool, rows: Rows, need: Need) -> Rows:
    """Those of `rows` that have nothing else to do, where somebody else is left for who comes next."""
    if len(prefill) > 1 and rows.size < 2:
        return rows[:0]
    return rows[prefill.queue_s(need.now)[rows] <= CALM_S]


def crowded(best: Ranked, candidate: Candidate, need: Need) -> bool:
    """Whether gaps would be over the limit where it goes, for it and for those who run there. A limit that nobody keeps even
    alone is none."""
    limit_s = need.slo.gap_s
    if limit_s is None or not best.runs_beside():
        return False
    return candidate.step_s > GAP_FILLED * limit_s and candidate.standard_gap_s <= limit_s


def in_a_lull(best: Ranked) -> bool:
    """Whether it harms nobody there, beside itself."""
    return isinstance(best.made, Split) or not best.runs_beside() or best.rank[0] == 0


WAITS = Nobody("its first token is too late already: it waits for a lull", busy=True, again_s=LULL_S, yields=True)
CROWDED = Nobody("token gaps would be over their limit wherever it goes", busy=True, again_s=LULL_S)
"""What a policy says."""


def filled(prefill: Pool, may: Mask, whole: Pool, may_whole: Mask, now: float) -> Nobody:
    return Nobody("every worker has prompts enough", busy=True, again_s=room_in_s([(prefill, may), (whole, may_whole)], now))


def begins_s(situation: Situation, now: float) -> list[float]:
    """In how many seconds each worker that computes prompts begins with the next one."""
    return [wait for pool in (situation.prefill, situation.whole) if len(pool) for wait in pool.queue_s(now).tolist()]
