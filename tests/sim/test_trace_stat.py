"""What `tandem trace stat` says, against figures worked out another way."""

from __future__ import annotations

import itertools
import json
import random
import statistics
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from cli.main import app
from core.errors import ConfigError
from core.eviction import POLICIES
from core.latency import percentile
from sim.cache_oracle import InventoryCache, LruOracle
from sim.trace_stat import TraceStat, stat_of
from sim.traces import read_trace
from sim.workload import Arrival
from sim.workload_shapes import Arrivals, arrivals

MOONCAKE = str(Path(__file__).parent / "data/mooncake_conversation_300.jsonl.gz")


def by_distance(accesses: list[int], capacity: int) -> float:
    """The definition the other way round: LRU finds what fewer than `capacity` others were asked for since (Mattson, 1970)."""
    last: dict[int, int] = {}
    found = 0
    for place, block in enumerate(accesses):
        if block in last:
            found += len(set(accesses[last[block] + 1 : place])) < capacity
        last[block] = place
    return round(found / len(accesses), 4)


def test_the_lru_oracle_is_exact_on_a_recorded_trace() -> None:
    oracle = LruOracle([100, 1000, 5859])
    for arrival in read_trace(MOONCAKE):
        oracle.add(arrival.blocks)
    accesses = [block for arrival in read_trace(MOONCAKE) for block in arrival.blocks]
    expected = {str(capacity): by_distance(accesses, capacity) for capacity in (100, 1000, 5859)}
    assert oracle.hit_ratio() == expected | {"unbounded": 0.0796}
    assert (oracle.blocks, oracle.distinct) == (len(accesses), len(set(accesses))) == (8490, 7814)
    assert expected["100"] < expected["1000"] < expected["5859"]


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 12), max_size=6), min_size=1, max_size=20), st.integers(1, 9))
def test_the_lru_oracle_is_exact_on_any_trace(requests: list[list[int]], capacity: int) -> None:
    oracle = LruOracle([capacity, 100])
    for blocks in requests:
        oracle.add(blocks)
    accesses = list(itertools.chain.from_iterable(requests))
    if accesses:
        assert oracle.hit_ratio()[str(capacity)] == by_distance(accesses, capacity)
        assert oracle.hit_ratio()["100"] == oracle.hit_ratio()["unbounded"]
    else:
        assert oracle.hit_ratio() == {}


@pytest.mark.parametrize("policy", POLICIES)
def test_the_shipped_table_of_blocks_finds_what_it_can(policy: str) -> None:
    """With room for all it finds what an unbounded cache does, for a prefix that is there is there whole; with less, less."""
    found = []
    for capacity in (200, 2000, 9000):
        cache = InventoryCache(capacity, policy)
        for arrival in read_trace(MOONCAKE):
            cache.add(arrival)
        found.append(round(cache.hit_ratio, 4))
    assert found[0] <= found[1] < found[2] == 0.0796


def test_figures_are_those_of_the_definitions() -> None:
    rng = random.Random(3)
    times = list(itertools.islice(arrivals(5.0, Arrivals.GAMMA, 2.0, rng), 3000))
    trace = [Arrival(at + 7, rng.randint(1, 5000), rng.randint(1, 90), session=f"s{n % 9}") for n, at in enumerate(times)]
    stat = TraceStat()
    stat.add_all(trace)
    figures = stat.figures()
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert figures["requests"] == 3000
    assert figures["sessions"] == 9
    assert figures["span_s"] == pytest.approx(times[-1])
    assert figures["rate_rps"] == pytest.approx(3000 / times[-1])
    assert figures["arrival_cv"] == pytest.approx(statistics.pstdev(gaps) / statistics.mean(gaps))
    lengths = sorted(a.input_tokens for a in trace)
    expected = {"mean": statistics.mean(lengths), **{f"p{p}": percentile(lengths, p) for p in (50, 90, 99)}}
    assert figures["input_tokens"] == pytest.approx(expected)
    assert list(figures["output_tokens"]) == ["mean", "p50", "p90", "p99"]
    for width in (1, 10, 60):
        counts = [sum(n * width <= at < (n + 1) * width for at in times) for n in range(int(times[-1] // width))]
        assert figures["dispersion"][str(width)] == pytest.approx(statistics.pvariance(counts) / statistics.mean(counts))
    assert "lru_hit_ratio" not in figures


@pytest.mark.parametrize("count", [0, 1, 3])
def test_few_requests_have_few_figures(count: int) -> None:
    stat = TraceStat()
    stat.add_all(Arrival(0.0, 4, 5) for _ in range(count))
    figures = stat.figures()
    assert (figures["requests"], figures["rate_rps"], figures["arrival_cv"]) == (count, None, None)
    assert figures["input_tokens"]["p99"] == (4 if count else None)


def test_a_file_without_times_or_answers_has_no_such_figures(tmp_path: Path) -> None:
    (tmp_path / "lengths").write_text("input_tokens,output_tokens\n10,1\n30,2\n")
    (tmp_path / "inputs").write_text("arrival_s,input_tokens\n0,10\n2,30\n4,30\n")
    lengths, inputs = (stat_of(str(tmp_path / name)) for name in ("lengths", "inputs"))
    assert (lengths["span_s"], lengths["rate_rps"], lengths["arrival_cv"]) == (None, None, None)
    assert lengths["output_tokens"] == {"mean": 1.5, "p50": 1.5, "p90": 1.9, "p99": pytest.approx(1.99)}
    assert (inputs["rate_rps"], inputs["arrival_cv"]) == (0.75, 0)
    assert set(inputs["output_tokens"].values()) == {None}


def tandem(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["trace", "stat", *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_the_command_prints_the_agreed_json() -> None:
    code, out, _ = tandem(MOONCAKE, "--json")
    figures = json.loads(out)
    assert code == 0
    asked = ["requests", "span_s", "rate_rps", "arrival_cv", "input_tokens", "output_tokens", "lru_hit_ratio"]
    assert set(asked) <= figures.keys()
    assert list(figures["input_tokens"]) == list(figures["output_tokens"]) == ["mean", "p50", "p90", "p99"]
    assert list(figures["lru_hit_ratio"]) == ["1000", "5859", "10000", "30000", "50000", "unbounded"]
    assert (figures["requests"], figures["span_s"], figures["lru_hit_ratio"]["unbounded"]) == (300, 102.0, 0.0796)


def test_the_command_shows_tables(tmp_path: Path) -> None:
    code, out, _ = tandem(MOONCAKE)
    assert code == 0
    for word in ("300 requests, Mooncake format", "tokens", "p99", "variance / mean", "5,859", "0.0796"):
        assert word in out
    (tmp_path / "one.csv").write_text("arrival_s,input_tokens,output_tokens,tenant\n0,1,1,a\n0,2,1,b\n")
    code, out, _ = tandem(str(tmp_path / "one.csv"))
    assert code == 0
    assert "2 tenants" in out


@pytest.mark.parametrize("flag", [[], ["--json"]])
@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("arrival_s,input_tokens,output_tokens\n0,1,1\n0,1,many\n", "row 2 (line 3), column output_tokens: 'many' is no"),
        ("who,knows\n", "is no trace known here"),
        ("arrival_s,input_tokens,output_tokens\n", "bad.csv has no requests"),
    ],
)
def test_a_bad_file_is_one_line_and_something_to_change(tmp_path: Path, text: str, why: str, flag: list[str]) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    code, out, error = tandem(str(path), *flag)
    assert (code, out) == (2, "")
    assert error.startswith("tandem: ")
    assert why in error
    assert error.count("\n") == 1


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"/nowhere\.csv"):
        stat_of("/nowhere.csv")
