"""Offering load: when requests are due, and that a slow answer never hides a wait."""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
from collections.abc import AsyncIterator

import pytest

from cli.load import Job, prompt_of, run_closed, run_open, send
from core.latency import Outcome, RequestTrace
from sim.workload_shapes import Arrivals, arrivals
from tandem.errors import InternalError, OverloadedError


class Echo:
    """Answers `max_tokens` tokens, `delay_s` after it is asked; counts how many it answers at once."""

    context_max: int | None = None

    def __init__(self, delay_s: float = 0.0) -> None:
        self.delay_s = delay_s
        self.now = self.most = self.asked = 0

    async def answer(self, job: Job) -> AsyncIterator[int]:
        self.asked += 1
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await asyncio.sleep(self.delay_s)
            if job.seed == 13:
                raise OverloadedError("full")
            if job.seed == 14:
                raise InternalError("oh")
            for _ in range(job.max_tokens):
                yield 1
        finally:
            self.now -= 1


def jobs(*due: float, tokens: int = 3) -> list[Job]:
    return [Job(at, 8, tokens, number) for number, at in enumerate(due)]


def test_poisson_arrivals_have_the_rate_and_spread_of_a_poisson_process() -> None:
    times = list(itertools.islice(arrivals(10.0, Arrivals.POISSON, 1.0, random.Random(1)), 5000))
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert abs(statistics.mean(gaps) - 0.1) < 0.005
    assert abs(statistics.stdev(gaps) / statistics.mean(gaps) - 1.0) < 0.05


def test_constant_arrivals_are_equal_steps() -> None:
    assert list(itertools.islice(arrivals(4.0, Arrivals.CONSTANT, 1.0, random.Random(1)), 4)) == [0.0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize("cv", [0.5, 2.0, 4.0])
def test_gamma_arrivals_have_the_rate_and_the_burstiness_that_were_asked_for(cv: float) -> None:
    times = list(itertools.islice(arrivals(10.0, Arrivals.GAMMA, cv, random.Random(7)), 40_000))
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert statistics.mean(gaps) == pytest.approx(0.1, rel=0.06)
    assert statistics.stdev(gaps) / statistics.mean(gaps) == pytest.approx(cv, rel=0.06)


def test_gamma_arrivals_without_variation_are_equal_steps() -> None:
    assert list(itertools.islice(arrivals(4.0, Arrivals.GAMMA, 0.0, random.Random(1)), 3)) == [0.0, 0.25, 0.5]


async def test_an_open_loop_does_not_wait_for_answers() -> None:
    target, seen = Echo(delay_s=0.3), list[RequestTrace]()
    traces = await run_open(target, jobs(*(n * 0.01 for n in range(10))), seen.append)
    assert target.most == 10
    assert len(traces) == len(seen) == 10
    assert all(t.outcome is Outcome.COMPLETED and len(t.token_s) == 3 for t in traces)


async def test_latency_counts_from_when_a_request_was_due() -> None:
    due = asyncio.get_running_loop().time() - 5.0
    trace = await send(Echo(), jobs(0.0)[0], due)
    assert trace.ttft_s is not None
    assert trace.ttft_s >= 5.0


async def test_a_closed_loop_keeps_its_number_of_clients_busy_until_the_jobs_end() -> None:
    target = Echo(delay_s=0.01)
    traces = await run_closed(target, iter(jobs(*[0.0] * 12)), 4, until_s=60.0, on_done=lambda trace: None)
    assert target.most == 4
    assert len(traces) == target.asked == 12


async def test_a_closed_loop_ends_at_its_time() -> None:
    endless = (Job(0.0, 8, 1, 1) for _ in itertools.count())
    traces = await run_closed(Echo(delay_s=0.01), endless, 2, until_s=0.1, on_done=lambda trace: None)
    assert 2 <= len(traces) <= 40


async def test_refusals_failures_and_empty_answers_are_told_apart() -> None:
    overload, failure, empty = Job(0, 8, 3, 13), Job(0, 8, 3, 14), Job(0, 8, 0, 1)
    traces = [await send(Echo(), job, 0.0) for job in (overload, failure, empty)]
    assert [t.outcome for t in traces] == [Outcome.REJECTED, Outcome.FAILED, Outcome.FAILED]
    assert [t.error for t in traces] == ["full", "oh", "the answer held no token"]


def test_prompts_share_what_their_trace_shares_and_nothing_else() -> None:
    one, two = (prompt_of(Job(0.0, 700, 1, seed, (7, block)), range(500)) for seed, block in ((1, 8), (2, 9)))
    assert len(one) == len(two) == 700
    assert one[:512] == two[:512]
    assert one[512:] != two[512:]
    assert prompt_of(Job(0.0, 100, 1, 3, (7, 8)), range(500)) == one[:100], "a prompt may end inside a block"
    short = prompt_of(Job(0.0, 20, 1, 3), range(500))
    assert short == prompt_of(Job(0.0, 20, 9, 3), range(500))
    assert short != prompt_of(Job(0.0, 20, 1, 4), range(500))
    assert prompt_of(Job(0.0, 9, 1, 1, (5,), 4), range(500))[:4] == prompt_of(Job(0.0, 6, 1, 2, (5,), 4), range(500))[:4]
