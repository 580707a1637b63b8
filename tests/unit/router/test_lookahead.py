"""Whom to serve first, against every choice there is."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.request import Slo
from router.lookahead import Job, most_in_time
from router.order import Slack, Waiting
from router.queue import WaitQueue


def names(jobs, now=0.0, begins_s=(0.0,)) -> str:
    return "".join(job.name for job in most_in_time(jobs, now, begins_s))


@pytest.mark.parametrize(
    ("jobs", "begins_s", "expected"),
    [
        ([Job(3, 1, "a"), Job(2, 1, "b")], (0,), "ba"),
        ([Job(2, 2, "a"), Job(3, 1, "b"), Job(4, 1, "c")], (0,), "abc"),
        ([Job(3, 3, "a"), Job(3.5, 1, "b"), Job(4, 1, "c")], (0,), "bc"),  # one long one for two short ones
        ([Job(3, 3, "a"), Job(3.5, 1, "b"), Job(4, 1, "c")], (0, 0), "abc"),  # two places
        ([Job(3, 1, "a")], (5,), ""),
        ([], (0,), ""),
    ],
)
def test_choices(jobs, begins_s, expected):
    assert names(jobs, begins_s=begins_s) == expected


def in_time(jobs, begins: float) -> bool:
    at = begins
    for job in sorted(jobs):
        at += job.takes_s
        if at > job.due:
            return False
    return True


times = st.integers(0, 12).map(float)


@settings(max_examples=200, deadline=None)
@given(jobs=st.lists(st.tuples(times, times), max_size=7), begins=times)
def test_on_one_machine_no_choice_keeps_more(jobs, begins):
    made = [Job(due, takes, str(number)) for number, (due, takes) in enumerate(jobs)]
    kept = most_in_time(made, 0.0, (begins,))
    assert in_time(kept, begins)
    assert not any(in_time(some, begins) for some in combinations(made, len(kept) + 1))


def waiting(name: str, at: float, prefill_s: float) -> Waiting:
    return Waiting(name, since=at, arrived_at=at, slo=Slo(ttft_s=3.0), prefill_s=prefill_s)


def ahead(queue: WaitQueue, now: float, *begins_s: float) -> str | None:
    queue.begins_s = lambda _: begins_s
    return queue.head(now)


def test_a_long_prompt_stands_back_where_it_would_cost_two_others_their_limits():
    queue = WaitQueue(10, Slack)
    for name, at, prefill_s in (("long", 0.0, 2.5), ("b", 0.3, 1.0), ("c", 0.4, 1.0)):
        queue.add(waiting(name, at, prefill_s))
    assert queue.head(0.4) == "long", "nobody said when a place begins with the next one"
    assert ahead(queue, 0.4, 0.0) == "b"
    assert ahead(queue, 0.4, 0.0, 0.0) == "long", "with two places all of them are in time"
    queue.taken("b", 0.4)
    queue.taken("c", 0.4)
    assert ahead(queue, 1.5, 0.0) == "long", "late by now, and nobody else is there"
