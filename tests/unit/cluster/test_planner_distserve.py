"""DistServe's plays and placements, with the coefficients that its authors published."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.closed_forms import single_ttft_s, tensor_ttft_s
from cluster.planner_distserve import (
    Machines,
    Search,
    Target,
    colocated_goodput_rps,
    layouts,
    pair_goodput_rps,
    place_anywhere,
    place_within_nodes,
    segment_pairs,
)
from cluster.planner_model import OPT_SHAPES, Arriving, FittedModel, Layout, Shape, fitted_model
from cluster.planner_play import Decode, Timing, play_colocated, play_decode, play_prefill, play_split
from core.errors import ConfigError
from core.request import Slo

DATA = Path(__file__).resolve().parents[2] / "data/distserve"


def published(model: str, engine: str = "distserve") -> FittedModel:
    tree = json.loads((DATA / f"profiler-a100-80g.{engine}.json").read_text())
    with (DATA / "max_num_tokens.csv").open() as rows:
        return fitted_model(tree, list(csv.DictReader(rows)), model, engine)


OPT13, OPT66 = published("facebook/opt-13b"), published("facebook/opt-66b")
ONE = Layout(1, 1)


def chat(rate_rps: float, count: int = 300) -> list[Arriving]:
    """As long as ShareGPT's conversations: prompts of 700 tokens and answers of 200 in the mean, 2,048 together."""
    draw = np.random.default_rng(0)
    prompts = np.clip(600 * np.exp(0.9 * draw.normal(size=count)), 4, 1600).astype(int)
    answers = np.clip(141 * np.exp(0.83 * draw.normal(size=count)), 1, 440).astype(int)
    gaps = np.random.default_rng(1).exponential(1.0, count)
    return [Arriving(*one) for one in zip(np.cumsum(gaps) / rate_rps, prompts.tolist(), answers.tolist(), strict=True)]


class Simple:
    """A prompt takes 10 ms whatever the batch, a token 1 ms; room for 100 tokens."""

    def prefill_s(self, tokens: int, squares: int, layout: Layout) -> float:
        return 0.01

    def decode_s(self, batch: int, context_tokens: int, layout: Layout) -> float:
        return 0.001

    def overhead_s(self, context_tokens: int) -> float:
        return 0.0

    def kv_tokens(self, layout: Layout) -> int:
        return 100


def test_prompts_that_come_together_are_one_batch_as_far_as_memory_goes() -> None:
    requests = [Arriving(at, tokens, 1) for at, tokens in ((0.0, 10), (0.001, 40), (0.002, 50), (0.003, 20))]
    assert play_prefill(requests, Simple(), ONE) == pytest.approx([0.01, 0.02, 0.02, 0.03])
    assert play_prefill(requests, Simple(), Layout(1, 2)) == pytest.approx([0.02, 0.03, 0.03, 0.04])


def test_a_batch_decodes_together_and_waits_for_memory_when_it_is_bounded() -> None:
    requests = [Arriving(0.0, 40, 10), Arriving(0.0, 40, 20), Arriving(0.0, 40, 10)]
    free = play_decode([0.0] * 3, requests, Simple(), ONE)
    assert free == pytest.approx([0.010, 0.020, 0.010])
    bounded = play_decode([0.0] * 3, requests, Simple(), ONE, Decode.BOUNDED)
    assert bounded == pytest.approx([0.010, 0.030, 0.040]), "50 and 60 tokens do not fit beside each other"


def test_waiting_prompts_stop_a_colocated_replica() -> None:
    requests = [Arriving(0.0, 10, 5), Arriving(0.0115, 10, 5)]
    first, second = play_colocated(requests, Simple(), ONE)
    assert first.ttft_s == pytest.approx(0.01)
    assert first.tpot_s == pytest.approx((0.005 + 0.01) / 5), "the second prompt held its tokens up"
    assert second.ttft_s == pytest.approx(0.0105)
    split = play_split(requests, Simple(), ONE, ONE)
    assert split[0].tpot_s == pytest.approx(0.001)


@pytest.mark.parametrize("tp", [1, 2])
def test_prompts_of_one_length_wait_as_long_as_the_closed_form_says(tp: int) -> None:
    class Single(Simple):
        """One prompt at a time: a second one never fits."""

        def prefill_s(self, tokens: int, squares: int, layout: Layout) -> float:
            return 0.1 if layout.tp == 1 else 0.1 / 1.6

    at = np.cumsum(np.random.default_rng(3).exponential(1 / 6, 200_000))
    requests = [Arriving(float(when), 60, 1) for when in at]
    done = play_prefill(requests, Single(), Layout(tp, 1))
    mean = float(np.mean(np.array(done) - at))
    assert mean == pytest.approx(single_ttft_s(6, 0.1) if tp == 1 else tensor_ttft_s(6, 0.1, 1.6), rel=0.02)


@given(
    st.lists(st.tuples(st.floats(0, 0.05), st.integers(1, 60), st.integers(1, 20)), min_size=1, max_size=25),
    st.sampled_from([ONE, Layout(1, 2), Layout(1, 3)]),
    st.sampled_from(list(Decode)),
)
@settings(max_examples=60, deadline=None)
def test_every_request_ends_and_no_sooner_than_its_work_takes(
    drawn: Sequence[tuple[float, int, int]], layout: Layout, how: Decode
) -> None:
    at = np.cumsum([gap for gap, _, _ in drawn]).tolist()
    requests = [Arriving(when, prompt, answer) for when, (_, prompt, answer) in zip(at, drawn, strict=True)]
    for timings in (play_split(requests, Simple(), layout, layout, how), play_colocated(requests, Simple(), layout)):
        for timing in timings:
            assert timing.ttft_s >= 0.01 * layout.pp - 1e-9
            assert timing.tpot_s >= 0.001 * layout.pp - 1e-9


def test_layouts_are_those_that_fit_and_divide() -> None:
    assert layouts(OPT_SHAPES["facebook/opt-66b"], OPT66, 4) == [Layout(2, 1), Layout(2, 2), Layout(3, 1), Layout(4, 1)]
    pairs = list(segment_pairs(Shape(4, 4), Machines(2, 3), Simple()))
    assert (Layout(2, 1), ONE) in pairs
    assert (Layout(1, 4), Layout(1, 2)) in pairs, "two nodes, each with two stages of prefill and one of decode"
    assert (Layout(2, 2), Layout(2, 2)) not in pairs, "four GPUs a segment, a node has three"
    assert len(pairs) == len(set(pairs))


@pytest.mark.parametrize("jointly", [False, True])
def test_opt_13b_is_placed_as_distserve_places_it(jointly: bool) -> None:
    target = Target(Slo(ttft_s=0.2, tpot_s=0.1), 0.9, jointly)
    found = place_within_nodes(OPT_SHAPES["facebook/opt-13b"], Machines(1, 4), OPT13, chat, target, 10.0, Search())
    assert (found.prefill, found.decode) == (Layout(2, 1), Layout(1, 1)), "their README and table 3"
    assert found.per_gpu_rps * 3 * found.prefill_replicas >= 10.0


def test_opt_66b_prefill_is_placed_as_distserve_places_it_and_its_decode_is_a_tie() -> None:
    target = Target(Slo(ttft_s=2.5, tpot_s=0.15), jointly=False)
    search = Search(step_rps=0.025)
    theirs = pair_goodput_rps(Layout(4, 1), Layout(2, 2), OPT66, chat, target, search) / 8
    found = place_within_nodes(OPT_SHAPES["facebook/opt-66b"], Machines(1, 8), OPT66, chat, target, 5.0, search)
    assert found.prefill == Layout(4, 1)
    assert found.decode.gpus == 4
    assert theirs >= 0.93 * found.per_gpu_rps


def test_high_affinity_sizes_the_pools_apart() -> None:
    target = Target(Slo(ttft_s=0.25, tpot_s=0.1))
    found = place_anywhere(OPT_SHAPES["facebook/opt-13b"], Machines(1, 4), OPT13, chat, target, 12.0, Search())
    assert found.decode == Layout(1, 1)
    assert found.decode_replicas > found.prefill_replicas >= 1
    assert found.gpus * found.per_gpu_rps >= 12.0


def test_the_same_engine_colocated_does_better_by_the_mean_gap() -> None:
    """Their simulator, and ours, under a limit of the mean gap: what PAPERS.md of ours calls the metric that decides."""
    target = Target(Slo(ttft_s=0.25, tpot_s=0.1), jointly=False)
    split = pair_goodput_rps(Layout(2, 1), ONE, OPT13, chat, target, Search()) / 3
    colocated = colocated_goodput_rps(Layout(2, 1), OPT13, chat, target, Search()) / 2
    vllm = colocated_goodput_rps(Layout(2, 1), published("facebook/opt-13b", "vllm"), chat, target, Search()) / 2
    assert vllm < split < colocated


def test_limits_that_nobody_meets_are_said() -> None:
    target = Target(Slo(ttft_s=0.01, tpot_s=0.1))
    with pytest.raises(ConfigError, match=r"TTFT 0\.01 s"):
        place_within_nodes(OPT_SHAPES["facebook/opt-13b"], Machines(1, 4), OPT13, chat, target, 1.0, Search())
    with pytest.raises(ConfigError, match="TTFT limit"):
        place_anywhere(OPT_SHAPES["facebook/opt-13b"], Machines(1, 4), OPT13, chat, target, 1.0, Search())
    with pytest.raises(ConfigError, match="has no facebook/opt-175b"):
        published("facebook/opt-175b")
    with pytest.raises(ConfigError, match=r"no profile of DistServe's"):
        fitted_model({"m": {"1": {"prefill": [1, 2]}}}, [], "m", "a file")


def test_attainment_counts_requests_that_meet_both() -> None:
    timings = [Timing(0.1, 0.1)] * 8 + [Timing(0.3, 0.1), Timing(0.1, 0.3)]
    target = Target(Slo(ttft_s=0.2, tpot_s=0.2), 0.85)
    assert target.attained(timings) == 0.8
    assert not target.met(timings)
    assert Target(target.slo, 0.85, jointly=False).met(timings), "nine in ten meet each"
