"""The report of a simulation: what is sampled over time, the page, the pictures."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure

from core.config import Config
from core.cost_model import CostModel, StepCost
from core.errors import ConfigError
from sim.report import page, write_html
from sim.report_plots import Plan, frontier, grid, pareto, svg, timelines
from sim.report_timeline import SAMPLES_MAX, PoolSample, Sample, Timeline
from sim.run import SimResult, simulate

MODEL = CostModel(StepCost(0.01, 5e-5, 1e-9, 1e-4, 1e-7), kv_token_bytes=1024)


def config(**sim: Any) -> Config:
    pools = [{"role": "prefill"}, {"role": "decode", "count": 2, "usd_per_gpu_hour": 3}]
    slo = {"ttft_s": 0.2, "tbt_s": 0.05}
    return Config.model_validate(
        {"sim": {"pools": pools, "slo": slo, "duration_s": 20, "rate_rps": 5, "input_tokens": 300, "output_tokens": 20, **sim}}
    )


@pytest.fixture(scope="module")
def watched() -> tuple[SimResult, Timeline]:
    timeline = Timeline()
    return simulate(config(), policy="goodput", model=MODEL, prepare=timeline.watch), timeline


def test_a_timeline_samples_every_role_until_the_end(watched: tuple[SimResult, Timeline]) -> None:
    result, timeline = watched
    assert timeline.roles() == ["prefill", "decode"]
    assert [one.pools["decode"].workers for one in timeline.samples] == [2] * len(timeline.samples)
    assert max(value for _, value in timeline.of("decode", lambda pool: pool.running)) > 0
    assert all(0 <= pool.kv_used <= 1 for one in timeline.samples for pool in one.pools.values())
    assert timeline.samples[-1].ended <= result.report["requests"]
    assert timeline.samples[-1].at_s > 19


def test_watching_changes_nothing_of_what_is_found(watched: tuple[SimResult, Timeline]) -> None:
    alone = simulate(config(), policy="goodput", model=MODEL).report
    unlike = {key for key, value in watched[0].report.items() if alone[key] != value}
    assert unlike == {"events", "wall_s"}


def sample(at_s: float, ended: int = 0, met: int = 0) -> Sample:
    return Sample(at_s, {"decode": PoolSample(1, 0, 1, 0.5)}, ended, ended, met)


def test_a_pool_of_which_nobody_lives_has_no_workers_and_no_line_drawn_across() -> None:
    timeline = Timeline()
    timeline.add(sample(0.0))
    timeline.add(Sample(1.0, {"prefill": PoolSample(2, 1, 0, 0)}, 0, 0, 0))
    timeline.add(sample(2.0))
    assert timeline.of("decode", lambda pool: pool.workers) == [(0.0, 1), (1.0, 0), (2.0, 1)]
    assert timeline.of("prefill", lambda pool: pool.workers) == [(0.0, 0), (1.0, 2), (2.0, 0)]


def test_a_long_run_keeps_a_bounded_number_of_samples() -> None:
    timeline = Timeline(step_s=1.0)
    for number in range(10 * SAMPLES_MAX):
        timeline.add(sample(float(number)))
    assert SAMPLES_MAX / 2 <= len(timeline.samples) < SAMPLES_MAX
    assert timeline.step_s > 8


def test_attainment_is_of_the_requests_that_ended_in_each_bin() -> None:
    timeline = Timeline(samples=[sample(0), sample(2, 10, 10), sample(4, 10, 10), sample(6, 20, 15)])
    assert timeline.attainment() == [(1.0, 1.0), (5.0, 0.5)]


def test_the_page_stands_alone_and_says_the_figures(watched: tuple[SimResult, Timeline], tmp_path: Any) -> None:
    result, timeline = watched
    path = tmp_path / "report.html"
    write_html(str(path), result.report, {"OVERLOADED": 3}, config(), timeline)
    text = path.read_text()
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!#)""", text)
    assert "<svg" in text
    assert f"{result.report['goodput_rps']:.3g}" in text
    assert "OVERLOADED" in text


def test_the_page_escapes_what_others_named(watched: tuple[SimResult, Timeline]) -> None:
    report = {**watched[0].report, "policy": "<script>"}
    assert "<script>" not in page(report, {"<b>": 1}, config(), "")


def test_a_value_over_its_limit_is_marked(watched: tuple[SimResult, Timeline]) -> None:
    strict = config(slo={"ttft_s": 1e-6, "tbt_s": 0.05})
    assert page(watched[0].report, {}, strict, "").count("class=over") == 4
    assert "class=over" not in page(watched[0].report, {}, config(slo={}), "")


def test_a_page_that_cannot_be_written_is_refused(watched: tuple[SimResult, Timeline], tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match="cannot write"):
        write_html(str(tmp_path / "missing" / "r.html"), watched[0].report, {}, config(), watched[1])


def test_nobody_on_the_frontier_is_beaten_in_cost_and_goodput() -> None:
    plans = [Plan("a", 1, 5), Plan("b", 2, 4), Plan("c", 2, 9), Plan("d", 3, 9), Plan("e", 4, 10)]
    assert [plan.label for plan in frontier(plans)] == ["a", "c", "e"]


def test_pictures_are_drawings_and_the_same_each_time(watched: tuple[SimResult, Timeline]) -> None:
    makers: list[Callable[[], Figure]] = [
        lambda: timelines(watched[1]),
        lambda: grid({(1, 1): 2.0, (2, 1): 3.0, (1, 2): 1.0}, "goodput"),
        lambda: pareto([Plan("a", 1, 5), Plan("b", 2, 9)], "plans"),
    ]
    for make in makers:
        text = svg(make())
        ElementTree.fromstring(text)
        assert text == svg(make())
