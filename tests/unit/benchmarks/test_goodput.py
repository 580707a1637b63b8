"""The load of benchmarks/goodput.py, and that its search finds what there is to find."""

from __future__ import annotations

import asyncio
import random
import statistics
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from benchmarks.azure_lengths import CONTEXT_MAX, INPUT_TOKENS, AzureConversation, Conversations, FromTrace
from benchmarks.goodput_search import Curve, Plan, search
from cli.load import Job, prompt_of
from core.latency import Outcome, RequestTrace
from core.request import Slo


def test_drawn_lengths_have_the_quantiles_they_are_drawn_from() -> None:
    rng = random.Random(1)
    drawn = [AzureConversation().draw(rng) for _ in range(20_000)]
    inputs = sorted(asked for asked, _ in drawn)
    assert statistics.mean(inputs) == pytest.approx(1195, rel=0.1)
    assert statistics.mean(told for _, told in drawn) == pytest.approx(201.5, rel=0.1)
    assert inputs[10_000] == pytest.approx(1015, rel=0.03)
    assert inputs[18_000] == pytest.approx(4074, rel=0.05)
    assert (min(INPUT_TOKENS), max(INPUT_TOKENS)) == (2, 14050)


def test_the_same_seed_asks_for_the_same_lengths_with_other_tokens() -> None:
    load = Conversations(AzureConversation(), shared=0.5)
    one, two = (load.jobs(20.0, 5.0, seed=3, content=content) for content in (1, 2))
    assert [(j.due_s, j.prompt_tokens, j.max_tokens, j.prefix_ids) for j in one] == [
        (j.due_s, j.prompt_tokens, j.max_tokens, j.prefix_ids) for j in two
    ]
    assert not {j.seed for j in one} & {j.seed for j in two}
    assert all(0 < j.prompt_tokens + j.max_tokens < CONTEXT_MAX for j in one)
    assert 0.3 < sum(bool(j.prefix_ids) for j in one) / len(one) < 0.7
    first, second = (next(j for j in jobs if j.prefix_ids and j.prompt_tokens > 200) for jobs in (one, two))
    prompts = [prompt_of(job, range(4000)) for job in (first, second)]
    assert prompts[0][: load.prefix_tokens] == prompts[1][: load.prefix_tokens]
    assert prompts[0][load.prefix_tokens :] != prompts[1][load.prefix_tokens :]


def test_a_faster_load_is_the_same_one_sooner() -> None:
    slow, fast = (Conversations(AzureConversation()).jobs(rate, 4.0, seed=1) for rate in (5.0, 10.0))
    shared = zip(slow, fast, strict=False)
    assert all(a.prompt_tokens == b.prompt_tokens and a.due_s == pytest.approx(2 * b.due_s) for a, b in shared)


def test_pairs_of_a_trace_stay_together(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("arrival_s,input_tokens,output_tokens\n0,10,1\n1,20,2\n")
    lengths = FromTrace(str(tmp_path / "t.csv"))
    assert {lengths.draw(random.Random(n)) for n in range(20)} == {(10, 1), (20, 2)}


class OneAtATime:
    """A server that takes `service_s` for each request and has one pair of hands."""

    context_max: int | None = None

    def __init__(self, service_s: float) -> None:
        self._hands = asyncio.Lock()
        self._service_s = service_s

    async def answer(self, job: Job) -> AsyncIterator[int]:
        async with self._hands:
            await asyncio.sleep(self._service_s)
        yield 1


@pytest.mark.parametrize("first_rate", [4.0, 100.0])
async def test_the_search_comes_from_either_side_to_what_the_server_can_take(first_rate: float) -> None:
    load = Conversations(AzureConversation())
    curve = await search(OneAtATime(0.02), load, Slo(0.2, 1.0, 1.0), Plan(2.0, 1, first_rate), "one at a time")
    assert curve.rate is not None
    assert 8 < curve.rate < 50, "it serves 50 per second at most"
    assert max(curve.joint) > curve.rate > min(curve.joint)


def test_a_curve_keeps_both_kinds_of_attainment() -> None:
    curve = Curve()
    quick = RequestTrace(0.0, 2.0, Outcome.COMPLETED, (0.1, *(0.1 + n / 100 for n in range(1, 20)), 2.0))
    curve.add(5.0, [quick], Slo(0.5, 0.2, 0.2))
    assert (curve.joint, curve.mean) == ({5.0: 0.0}, {5.0: 1.0}), "a stall that a mean hides"
