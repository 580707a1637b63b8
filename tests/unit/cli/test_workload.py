"""Loads that are drawn, and loads that are replayed."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from cli.load import Job, prompt_of
from cli.workload import Replay, Sharing, Workload
from sim.trace_arrivals import Missing
from sim.workload_lengths import TokenRange
from sim.workload_shapes import Arrivals
from tandem.errors import InvalidRequestError


def workload(seed: int = 1, sharing: Sharing | None = None) -> Workload:
    return Workload(TokenRange(10, 40), TokenRange(5, 5), sharing or Sharing(), Arrivals.POISSON, 1.0, seed)


def test_the_same_seed_gives_the_same_load_and_another_one_another() -> None:
    one, same, other = (list(workload(seed).open(50.0, 4.0)) for seed in (1, 1, 2))
    assert one == same != other
    assert 150 < len(one) < 250
    assert all(0 <= job.due_s < 4.0 for job in one)


def test_lengths_fill_their_range() -> None:
    jobs = list(itertools.islice(workload().closed(), 500))
    assert {job.prompt_tokens for job in jobs} == set(range(10, 41))
    assert {job.max_tokens for job in jobs} == {5}
    assert len({job.seed for job in jobs}) == 500


def test_prompts_share_as_many_prefixes_as_were_asked_for() -> None:
    jobs = itertools.islice(workload(sharing=Sharing(8, 3)).closed(), 100)
    prompts = [prompt_of(job, range(10_000)) for job in jobs]
    assert len({tuple(prompt[:8]) for prompt in prompts}) == 3
    assert len({tuple(prompt[:9]) for prompt in prompts}) > 60
    assert all(10 <= len(prompt) <= 40 for prompt in prompts)


def test_a_prompt_shorter_than_the_prefix_is_all_prefix() -> None:
    (job,) = itertools.islice(workload(sharing=Sharing(100, 1)).closed(), 1)
    assert len(prompt_of(job, range(100))) == job.prompt_tokens


@pytest.mark.parametrize(("text", "lengths"), [("7", TokenRange(7, 7)), ("1-9", TokenRange(1, 9))])
def test_lengths_are_read(text: str, lengths: TokenRange) -> None:
    assert TokenRange.parse(text, "--input-tokens") == lengths


@pytest.mark.parametrize("text", ["", "0", "-4", "9-1", "a", "1-b", "1.5", "3-"])
def test_lengths_that_cannot_be_are_refused_by_option(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="--input-tokens must be"):
        TokenRange.parse(text, "--input-tokens")


TRACE = "arrival_s,input_tokens,output_tokens\n0,1000,100\n1,4000,1\n2,10,3000\n9,5,5\n"
MOONCAKE = '{"timestamp": 0, "input_length": 1500, "output_length": 5, "hash_ids": [7, 8, 9]}\n'
INF = float("inf")


def replayed(tmp_path: Path, text: str, context: int | None = None, speed: float = 1.0, scale: float = 1.0, most: float = INF):
    (tmp_path / "trace").write_text(text)
    jobs = Replay(str(tmp_path / "trace"), speed, scale, most, most, 1).open(5.0, context)
    return [(job.due_s, job.prompt_tokens, job.max_tokens) for job in jobs]


def test_a_trace_is_replayed_as_it_is_until_the_time_is_over(tmp_path: Path) -> None:
    assert replayed(tmp_path, TRACE) == [(0, 1000, 100), (1, 4000, 1), (2, 10, 3000)]
    assert [due for due, *_ in replayed(tmp_path, TRACE, speed=2.0)] == [0, 0.5, 1.0, 4.5]


def test_a_file_of_lengths_alone_comes_at_the_rate_that_is_given(tmp_path: Path) -> None:
    (tmp_path / "trace").write_text("input_tokens,output_tokens\n" + "9,2\n" * 400)
    replay = Replay(str(tmp_path / "trace"), 2.0, 1.0, INF, INF, 1, Missing(10.0, 1.0, None, 1))
    jobs = list(replay.open(10.0, None))
    assert 150 < len(jobs) < 250, "twenty a second for ten seconds"
    assert all(job.due_s < 10 for job in jobs)


def test_turns_of_a_session_share_their_prompts(tmp_path: Path) -> None:
    (tmp_path / "trace").write_text("arrival_s,input_tokens,output_tokens,session\n0,40,2,a\n1,40,2,b\n2,60,2,a\n")
    first, other, second = Replay(str(tmp_path / "trace"), 1.0, 1.0, INF, INF, 1).open(5.0, None)
    said, stranger, more = (prompt_of(job, range(10_000)) for job in (first, other, second))
    assert more[:40] == said != stranger
    assert len(more) == 60


def test_lengths_of_a_trace_are_scaled_then_cut_then_made_to_fit_the_model(tmp_path: Path) -> None:
    assert replayed(tmp_path, TRACE, scale=0.1, most=250) == [(0, 100, 10), (1, 250, 1), (2, 1, 250)]
    assert replayed(tmp_path, TRACE, context=2048) == [(0, 1000, 100), (1, 2046, 1), (2, 10, 1024)]


def test_shared_blocks_of_a_trace_shrink_with_its_lengths(tmp_path: Path) -> None:
    (tmp_path / "trace").write_text(MOONCAKE)
    (job,) = Replay(str(tmp_path / "trace"), 1.0, 0.125, INF, INF, 1).open(5.0, None)
    assert (job.prompt_tokens, job.prefix_ids, job.prefix_block) == (187, (7, 8, 9), 64)
    other = Job(0.0, 150, 1, 99, (7, 8, 10), 64)
    shared = zip(prompt_of(job, range(10_000)), prompt_of(other, range(10_000)), strict=False)
    assert len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], shared))) == 128
