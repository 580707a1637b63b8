"""Whom to serve so that most of those who wait keep their limit of the first token. Deciding code.

J. M. Moore, "An n job, one machine sequencing algorithm for minimizing the number of late jobs", Management Science 15 (1968),
with Hodgson's proof: in order of their deadlines, whenever one would be late, the longest so far is left out. On one machine
no choice has fewer late ones; on several, where jobs go to whichever begins first, it is a good one. Those left out are not
forgotten: they are looked at again each time, and served once nobody is in time.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from typing import NamedTuple

LOOKED_AHEAD = 32
"""Requests and places that are looked at: a choice takes half a millisecond at most."""


class Job(NamedTuple):
    """`due`: when it must be done."""

    due: float
    takes_s: float
    name: str


def most_in_time(jobs: Iterable[Job], now: float, begins_s: Sequence[float]) -> list[Job]:
    """Those to serve, in order. `begins_s`: in how many seconds each place can begin with one; not empty."""
    kept = sorted(jobs)
    free_at = [now + begins for begins in heapq.nsmallest(LOOKED_AHEAD, begins_s)]
    while (late := _first_late(kept, free_at)) is not None:
        del kept[max(range(late + 1), key=lambda number: kept[number].takes_s)]
    return kept


def _first_late(jobs: Sequence[Job], free_at: Sequence[float]) -> int | None:
    places = list(free_at)  # smallest first, which is a heap
    for number, job in enumerate(jobs):
        done = places[0] + job.takes_s
        if done > job.due:
            return number
        heapq.heapreplace(places, done)
    return None
