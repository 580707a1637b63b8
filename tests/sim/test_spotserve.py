"""SpotServe's controller: the configurations its paper reports, from the profiles its authors measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.planner_spot import Configuration, Fleet, LayerProfile, Pipeline, decide, layer_profile, reroute
from core.errors import ConfigError

DATA = Path(__file__).parents[1] / "data/spotserve"


def profile(name: str) -> LayerProfile:
    return layer_profile(json.loads((DATA / name).read_text()), name)


OPT_6_7B, GPT_20B = profile("T4-4x_megatron_6.7B_profile.json"), profile("T4-4x_megatron_h6144_profile.json")
STABLE_RPS = 0.35


def fleet(instances: int, obtainable: int = 0) -> Fleet:
    return Fleet(instances, obtainable, gpus_min=12)


def chosen(instances: int, arrivals_rps: float) -> Configuration:
    decision = decide(GPT_20B, fleet(instances), arrivals_rps)
    assert decision is not None
    return decision.configuration


@pytest.mark.parametrize(
    ("layers", "pipeline", "seconds"), [(OPT_6_7B, Pipeline(1, 4, 1), 5.447), (GPT_20B, Pipeline(3, 4, 1), 14.373)]
)
def test_latencies_of_the_papers_table(layers: LayerProfile, pipeline: Pipeline, seconds: float) -> None:
    assert layers.latency_s(pipeline, 128) == pytest.approx(seconds, rel=0.001)


@pytest.mark.parametrize(
    ("situation", "instances", "arrivals_rps", "shape"),
    [
        ("eight instances or more", 8, STABLE_RPS, (2, 2, 8)),
        ("eight instances or more", 9, STABLE_RPS, (2, 2, 8)),
        ("eight instances or more", 10, STABLE_RPS, (2, 2, 8)),
        ("eight instances or more", 12, STABLE_RPS, (2, 2, 8)),
        ("one of eight is taken", 7, STABLE_RPS, (2, 3, 4)),
        ("the fluctuating load begins on ten", 10, 0.55, (2, 2, 8)),
        ("it overloads them", 10, 0.75, (3, 3, 4)),
        ("two more have come", 12, 0.75, (3, 2, 8)),
        ("the load falls", 12, 0.55, (2, 2, 8)),
    ],
)
def test_decisions_that_the_paper_reports(
    situation: str, instances: int, arrivals_rps: float, shape: tuple[int, int, int]
) -> None:
    assert chosen(instances, arrivals_rps).shape == shape, situation


def test_rerouting_would_lose_a_pipeline() -> None:
    left = reroute(GPT_20B, chosen(8, STABLE_RPS), fleet(7))
    assert left is not None
    assert left.shape == (1, 2, 8)
    assert left.rate_rps < STABLE_RPS < chosen(7, STABLE_RPS).rate_rps
    assert reroute(GPT_20B, chosen(8, STABLE_RPS), fleet(3)) is None


def test_what_can_be_had_is_asked_for_and_what_is_spare_released() -> None:
    more = decide(GPT_20B, fleet(7, obtainable=2), STABLE_RPS)
    assert more is not None
    assert (more.configuration.shape, more.change) == ((2, 2, 8), 1)
    less = decide(GPT_20B, fleet(12), 0.55)
    assert less is not None
    assert less.change == -4


def test_too_few_instances_for_the_model() -> None:
    assert decide(GPT_20B, fleet(2), STABLE_RPS) is None


@settings(deadline=None)
@given(instances=st.integers(3, 14), obtainable=st.integers(0, 3), arrivals_rps=st.floats(0.01, 3))
def test_it_keeps_up_where_anything_does_and_else_serves_most(instances: int, obtainable: int, arrivals_rps: float) -> None:
    decision = decide(GPT_20B, fleet(instances, obtainable), arrivals_rps)
    assert decision is not None
    most = decide(GPT_20B, fleet(instances, obtainable), 1e9)
    assert most is not None
    assert decision.configuration.instances(4) <= instances + obtainable
    if decision.configuration.rate_rps < arrivals_rps:
        assert decision.configuration == most.configuration
        assert decision.change <= 0, "nothing is bought that does not help to keep up"


def test_a_damaged_profile_is_named() -> None:
    with pytest.raises(ConfigError, match=r"p\.json is no profile of SpotServe's: KeyError 'max_tp'"):
        layer_profile({}, "p.json")
