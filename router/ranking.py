"""What a request should keep, and by what its placements are ranked. Deciding code."""

from __future__ import annotations

import math
from typing import NamedTuple

from router.policy import Need

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
        ttft_s, gap_s = need.slo.ttft_s or math.inf, need.slo.gap_s
        tenth = 1 / max(1.0, need.output_tokens / 10)
        return Goal(NEAR * ttft_s, math.inf if gap_s is None else NEAR * gap_s, need.output_tokens, tenth)

    def unhurried(self) -> Goal:
        """Without the limit of the first token."""
        return self._replace(ttft_s=math.inf)


Rank = tuple[float, float, float, float, str]
"""Smaller is better: requests expected to miss a limit, then by how much this one does, then the time until its last token;
ties go to the less loaded, then by name."""


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
