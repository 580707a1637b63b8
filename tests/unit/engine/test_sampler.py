"""The sampler: each transformation against a table, draws against their distribution, rows against their neighbours."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.sampler import Sampler, filtered, uniform
from engine.step import SampleSpec
from tandem.sampling import SamplingParams

VOCAB = 32


def spec(
    params: SamplingParams, position: int = 0, choice: int = 0, history: Sequence[int] = (1,), prompt_len: int = 1
) -> SampleSpec:
    return SampleSpec(params, choice, position, history, prompt_len)


def pick(logits: Sequence[float], params: SamplingParams, **where: Any) -> int:
    return Sampler(len(logits)).sample(torch.tensor([logits]), [spec(params, **where)])[0].token_id


def kept(probabilities: Sequence[float], **params: Any) -> list[int]:
    """Tokens that survive the filters, for a row with the given probabilities."""
    logits = torch.tensor([probabilities]).log()
    return filtered(logits, [SamplingParams(**params)])[0].nonzero().flatten().tolist()


GREEDY = SamplingParams(temperature=0.0)


@pytest.mark.parametrize(
    ("logits", "changes", "history", "prompt_len", "expected"),
    [
        ([0.0, 3.0, 2.0], {}, [0], 1, 1),
        ([0.0, 3.0, 3.0], {}, [0], 1, 1),  # the lowest id wins a tie
        ([0.0, 3.0, 2.0], {"repetition_penalty": 2.0}, [1], 1, 2),  # counts the prompt
        ([-1.0, -3.0, -2.0], {"repetition_penalty": 4.0}, [0], 1, 2),  # negative scores are multiplied
        ([0.0, 3.0, 2.0], {"presence_penalty": 2.0}, [1], 1, 1),  # does not count the prompt
        ([0.0, 3.0, 2.0], {"presence_penalty": 2.0}, [0, 1], 1, 2),
        ([0.0, 3.0, 2.0], {"frequency_penalty": 0.6}, [0, 1], 1, 1),
        ([0.0, 3.0, 2.0], {"frequency_penalty": 0.6}, [0, 1, 1], 1, 2),  # per occurrence
        ([0.0, 3.0, 2.0], {"presence_penalty": -2.0}, [0, 2], 1, 2),  # a negative penalty invites
        ([0.0, 3.0, 2.0], {"logit_bias": {0: 4.0}}, [0], 1, 0),
        ([0.0, 3.0, 2.0], {"logit_bias": {1: -100.0, 99: 5.0}}, [0], 1, 2),  # ids beyond the vocabulary mean nothing
    ],
)
def test_greedy_choice_after_penalties(
    logits: list[float], changes: dict[str, Any], history: list[int], prompt_len: int, expected: int
) -> None:
    assert pick(logits, replace(GREEDY, **changes), history=history, prompt_len=prompt_len) == expected


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, [0, 1, 2, 3]),
        ({"top_k": 1}, [0]),
        ({"top_k": 3}, [0, 1, 2]),
        ({"top_k": 2}, [0, 1, 2]),  # 1 and 2 are equal: ties at the edge stay
        ({"top_k": 99}, [0, 1, 2, 3]),
        ({"top_p": 0.4}, [0]),
        ({"top_p": 0.5}, [0, 1, 2]),
        ({"top_p": 0.85}, [0, 1, 2]),
        ({"top_p": 0.95}, [0, 1, 2, 3]),
        ({"top_p": 1e-9}, [0]),
        ({"min_p": 0.45}, [0, 1, 2]),
        ({"min_p": 0.6}, [0]),
        ({"min_p": 1.0}, [0]),
        ({"top_k": 3, "top_p": 0.53}, [0, 1, 2]),  # top-p counts what top-k left: 0.4 / 0.8 is short of 0.53
        ({"top_k": 3, "top_p": 0.45}, [0]),
    ],
)
def test_filters(params: dict[str, Any], expected: list[int]) -> None:
    distribution = [0.44, 0.22, 0.22, 0.12]
    assert kept(distribution, **params) == expected


def test_top_p_looks_beyond_its_first_glance() -> None:
    flat = [1.0 / 4096] * 4096
    assert len(kept(flat, top_p=0.9)) == 4096, "all tie"
    sloped = torch.linspace(1.0, 2.0, 4096)
    share = sloped / sloped.sum()
    chosen = kept(share.tolist(), top_p=0.5)
    assert share[chosen].sum() >= 0.5 > share[chosen[1:]].sum()


def test_temperature_sharpens_and_flattens() -> None:
    logits = torch.tensor([[1.0, 0.0]])
    shares = [filtered(logits, [SamplingParams(temperature=t)])[0, 0].item() for t in (0.5, 1.0, 2.0)]
    assert shares == pytest.approx([1 / (1 + math.exp(-1 / t)) for t in (0.5, 1.0, 2.0)])


def test_the_generator_is_the_documented_one() -> None:
    """Fixed for good: another generator would change the tokens of every seeded request."""
    assert uniform(0, 0, 0) == 0.156742553465558
    assert uniform(7, 1, 12) == 0.6910164860254577
    assert uniform(2**64 - 1, 127, 10**6) == 0.4197304240240689


def test_draws_are_uniform() -> None:
    draws = sorted(uniform(5, 0, n) for n in range(20000))
    gap = max(abs(u - (i + 0.5) / len(draws)) for i, u in enumerate(draws))
    assert gap < 0.0123, "Kolmogorov-Smirnov at 0.5 %"


@pytest.mark.parametrize("axis", ["position", "choice", "seed"])
def test_sampled_tokens_follow_the_distribution(axis: str) -> None:
    probabilities = [0.5, 0.25, 0.125, 0.0625, 0.0625, 0.0]
    logits = torch.tensor([probabilities]).log().expand(4000, -1)
    specs = [
        spec(SamplingParams(seed=n if axis == "seed" else 1), n if axis == "position" else 0, n if axis == "choice" else 0)
        for n in range(4000)
    ]
    counts = Counter(p.token_id for p in Sampler(6).sample(logits, specs))
    assert counts[5] == 0
    chi_squared = sum((counts[i] - 4000 * p) ** 2 / (4000 * p) for i, p in enumerate(probabilities[:5]))
    assert chi_squared < 18.5, "0.1 % of a chi-squared with 4 degrees"


def test_logprobs_are_those_of_the_model_itself() -> None:
    logits = [2.0, 1.0, 0.0, -1.0]
    params = SamplingParams(temperature=0.3, top_k=1, logit_bias={2: 50.0}, logprobs=2, seed=1)
    picked = Sampler(4).sample(torch.tensor([logits]), [spec(params)])[0]
    whole = math.log(sum(map(math.exp, logits)))
    assert picked.token_id == 2
    assert picked.logprob == pytest.approx(0.0 - whole, abs=1e-6)
    assert [token for token, _ in picked.top_logprobs] == [0, 1]
    assert [value for _, value in picked.top_logprobs] == pytest.approx([2.0 - whole, 1.0 - whole], abs=1e-6)


def test_logprobs_only_where_asked() -> None:
    rows = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0))
    asked = [spec(replace(GREEDY, logprobs=count)) for count in (None, 0, 5)]
    none, own, five = Sampler(VOCAB).sample(rows, asked)
    assert (none.logprob, none.top_logprobs) == (None, ())
    assert own.logprob is not None
    assert own.top_logprobs == ()
    assert len(five.top_logprobs) == 5
    assert five.logprob == five.top_logprobs[0][1]


def test_logits_are_left_as_they_were() -> None:
    rows = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(0))
    before = rows.clone()
    Sampler(VOCAB).sample(rows, [spec(SamplingParams(repetition_penalty=1.5, seed=1)), spec(SamplingParams(seed=1, min_p=0.1))])
    assert torch.equal(rows, before)


def test_the_last_token_can_be_drawn_and_nothing_beyond() -> None:
    logits = torch.tensor([[-math.inf, -math.inf, 0.0, -math.inf]])
    assert all(Sampler(4).sample(logits, [spec(SamplingParams(seed=s))])[0].token_id == 2 for s in range(200))


params_strategy = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.2, 0.7, 1.0, 1.5, 50.0]),
    top_k=st.sampled_from([0, 0, 1, 3, 10, 31, 100]),
    top_p=st.sampled_from([1.0, 1.0, 0.95, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.7]),
    presence_penalty=st.sampled_from([0.0, 0.5, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.5, -1.0]),
    logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100, width=32), max_size=3),
    seed=st.integers(0, 2**64 - 1),
    logprobs=st.sampled_from([None, 0, 3]),
)
row_strategy = st.builds(
    SampleSpec,
    params=params_strategy,
    choice=st.integers(0, 127),
    position=st.integers(0, 4096),
    history=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20).map(tuple),
    prompt_len=st.just(1),
)


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(row_strategy, min_size=1, max_size=6), seed=st.integers(0, 1000))
def test_a_row_never_feels_its_neighbours(rows: list[SampleSpec], seed: int) -> None:
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    together = Sampler(VOCAB).sample(logits, rows)
    alone = [Sampler(VOCAB).sample(logits[i : i + 1], [row])[0] for i, row in enumerate(rows)]
    assert together == alone


@settings(max_examples=150, deadline=None)
@given(params=params_strategy, seed=st.integers(0, 1000))
def test_the_best_token_always_survives_and_the_rest_sums_up(params: SamplingParams, seed: int) -> None:
    params = replace(params, temperature=max(params.temperature, 0.2))
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    left = filtered(logits, [params])[0]
    assert left[logits[0].argmax()] > 0
    assert 0 < left.sum() <= 1 + 1e-5
    if params.top_k:
        assert (left > 0).sum() <= params.top_k, "no ties in this draw"
