"""Workloads that are made, and that scaling a rate keeps what a trace is about."""

from __future__ import annotations

import itertools
import random
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from core.errors import ConfigError
from sim.cache_oracle import LruOracle
from sim.traces import read_trace
from sim.workload import Arrival, labelled, merged, rescaled, resized, within_context
from sim.workload_lengths import Apart, Pairs, Quantiles, TokenRange, drawn
from sim.workload_sessions import Chat, superposed, with_sessions
from sim.workload_shapes import Arrivals, RateCurve, arrivals, bursts, ramp, spread_ticks

MOONCAKE = str(Path(__file__).parent / "data/mooncake_conversation_300.jsonl.gz")
SHORT = Apart(TokenRange(10, 400), TokenRange(5, 100))


def poisson(rate: float, seed: int) -> Iterable[float]:
    return arrivals(rate, Arrivals.POISSON, 1.0, random.Random(seed))


def chats(seed: int = 1, count: int = 40, chat: Chat | None = None) -> list[Arrival]:
    chat = chat or Chat(SHORT, block_tokens=64)
    return list(chat.arrivals(itertools.islice(poisson(1.0, seed), count), random.Random(seed)))


def cv(times: Sequence[float]) -> float:
    gaps = [b - a for a, b in itertools.pairwise(times)]
    return statistics.pstdev(gaps) / statistics.mean(gaps)


def by_session(workload: Iterable[Arrival]) -> dict[str, list[Arrival]]:
    found: dict[str, list[Arrival]] = defaultdict(list)
    for arrival in workload:
        found[arrival.session].append(arrival)
    return found


def is_ordered(workload: Sequence[Arrival]) -> bool:
    return all(a.arrival_s <= b.arrival_s for a, b in itertools.pairwise(workload))


MAKERS = {
    "gamma": lambda rng: list(itertools.islice(drawn(arrivals(9.0, Arrivals.GAMMA, 3.0, rng), SHORT, rng), 200)),
    "chat": lambda rng: list(Chat(SHORT).arrivals(itertools.islice(arrivals(1, Arrivals.POISSON, 1, rng), 20), rng)),
    "bursts": lambda rng: list(drawn(bursts(2, 20, 10, 2, 60).due(arrivals(1, Arrivals.POISSON, 1, rng)), SHORT, rng)),
    "superposed": lambda rng: list(superposed(chats(), 2.5, rng)),
    "ticks": lambda rng: list(spread_ticks((Arrival(float(n // 9), 5, 5) for n in range(99)), rng)),
}


@pytest.mark.parametrize("name", MAKERS)
def test_the_same_seed_makes_the_same_workload_and_another_one_another(name: str) -> None:
    one, same, other = (MAKERS[name](random.Random(seed)) for seed in (1, 1, 2))
    assert one == same != other
    assert len(one) > 20
    assert is_ordered(one)
    assert all(a.input_tokens > 0 < a.output_tokens for a in one)


# Rates that change


def test_a_ramp_brings_as_many_as_lie_under_it_and_more_of_them_later() -> None:
    curve = ramp(10.0, 30.0, 100.0)
    assert (curve.requests, curve.duration_s) == (2000.0, 100.0)
    times = list(curve.due(poisson(1.0, 3)))
    assert len(times) == pytest.approx(2000, abs=200)
    assert sum(at < 50 for at in times) == pytest.approx(750, abs=120)
    assert list(ramp(0.0, 2.0, 1.0).due([0.0, 0.25, 0.5])) == pytest.approx([0.0, 0.5, 0.5**0.5])
    assert list(ramp(2.0, 0.0, 1.0).due([0.0, 0.75])) == pytest.approx([0.0, 0.5])


def test_bursts_come_at_the_end_of_each_period() -> None:
    times = list(bursts(1.0, 100.0, every_s=10.0, burst_s=1.0, duration_s=95.0).due(poisson(1.0, 4)))
    within = sum(at % 10 >= 9 for at in times)
    assert within == pytest.approx(900, abs=120)
    assert len(times) - within == pytest.approx(86, abs=35)
    assert max(times) < 95


@pytest.mark.parametrize(
    "points", [[], [(0, 1)], [(1, 1), (2, 1)], [(0, 1), (2, 1), (1, 1)], [(0, -1), (1, 1)], [(0, 0), (1, 0)], [(0, 1), (0, 2)]]
)
def test_curves_that_cannot_be_are_refused(points: list[tuple[float, float]]) -> None:
    with pytest.raises(ValueError, match="rate"):
        RateCurve(points)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 50), st.floats(0, 9)), min_size=1, max_size=6), st.integers(0, 99))
def test_any_curve_keeps_order_and_ends(pieces: list[tuple[float, float]], seed: int) -> None:
    times = itertools.accumulate((length for length, _ in pieces), initial=0.0)
    points = [(at, rate) for at, (_, rate) in zip(times, [(0.0, 1.0), *pieces], strict=True)]
    assume(
        sum((b - a) * (low + high) for (a, low), (b, high) in itertools.pairwise(points)) > 1e-6
    )  # the others are refused, above
    curve = RateCurve(points)
    due = list(curve.due(poisson(1.0, seed)))
    assert due == sorted(due)
    assert all(0 <= at <= curve.duration_s for at in due)
    assert abs(len(due) - curve.requests) <= 6 * curve.requests**0.5 + 6


# Rates that are scaled


@settings(deadline=None)
@given(
    st.lists(st.floats(1e-3, 1e3), min_size=3, max_size=50).map(lambda gaps: list(itertools.accumulate(gaps))),
    st.floats(0.01, 100),
)
def test_rescaling_multiplies_the_rate_and_keeps_the_cv_and_all_else(times: list[float], factor: float) -> None:
    before = [Arrival(at, 3, 4, (n,), 5, "s", "t", "c") for n, at in enumerate(times)]
    after = list(rescaled(before, factor))
    assert cv([a.arrival_s for a in after]) == pytest.approx(cv(times), rel=1e-6, abs=1e-9)
    assert [a.arrival_s * factor for a in after] == pytest.approx(times)
    assert all((a.blocks, a.session, a.tenant, a.slo_class) == ((n,), "s", "t", "c") for n, a in enumerate(after))


def test_rescaling_a_trace_keeps_what_a_cache_finds_exactly() -> None:
    found = []
    for factor in (1.0, 3.7):
        oracle = LruOracle([100, 1000])
        for arrival in rescaled(read_trace(MOONCAKE), factor):
            oracle.add(arrival.blocks)
        found.append(oracle.hit_ratio())
    assert found[0] == found[1]


@pytest.mark.parametrize("factor", [0.0, -1.0, float("inf"), float("nan")])
def test_a_rate_is_scaled_by_a_number_above_zero(factor: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        list(rescaled([], factor))
    with pytest.raises(ValueError, match="above 0"):
        list(superposed([], factor, random.Random(1)))


@settings(max_examples=30, deadline=None)
@given(st.floats(0.05, 1.0), st.integers(0, 1000))
def test_thinning_keeps_sessions_whole_and_untouched(share: float, seed: int) -> None:
    whole = by_session(chats())
    kept = list(superposed(chats(), share, random.Random(seed)))
    assert is_ordered(kept)
    assert all(turns == whole[name] for name, turns in by_session(kept).items())


def test_thinning_keeps_as_many_sessions_as_it_should() -> None:
    whole = by_session(chats(count=2000))
    kept = by_session(superposed(chats(count=2000), 0.3, random.Random(5)))
    assert len(kept) / len(whole) == pytest.approx(0.3, abs=0.04)
    lone = [Arrival(float(n), 1, 1) for n in range(2000)]
    assert len(list(superposed(lone, 0.3, random.Random(5)))) == pytest.approx(600, abs=80)


@settings(max_examples=30, deadline=None)
@given(st.floats(1.0, 4.0), st.integers(0, 1000))
def test_copies_of_a_session_are_whole_late_alike_and_share_nothing(factor: float, seed: int) -> None:
    whole = by_session(chats())
    many = list(superposed(chats(), factor, random.Random(seed), jitter_s=2.0))
    assert is_ordered(many)
    owners: dict[int, str] = {}
    for name, turns in by_session(many).items():
        original = whole[name.split("#")[0]]
        late = [turn.arrival_s - one.arrival_s for turn, one in zip(turns, original, strict=True)]
        assert max(late) - min(late) < 1e-6
        assert 0 <= late[0] <= 2.0
        for block in itertools.chain.from_iterable(turn.blocks for turn in turns):
            assert owners.setdefault(block, name) == name
    copies = Counter(name.split("#")[0] for name in by_session(many))
    assert copies.keys() == whole.keys()
    assert set(copies.values()) <= {int(factor), int(factor) + 1}


# Sessions


def test_a_turn_begins_with_all_that_was_said_before() -> None:
    chat = Chat(SHORT, turns_mean=5, system_tokens=130, systems=2, block_tokens=64)
    sessions = by_session(chats(count=60, chat=chat))
    assert len(sessions) == 60
    assert statistics.mean(map(len, sessions.values())) == pytest.approx(5, abs=2)
    for turns in sessions.values():
        for before, after in itertools.pairwise(turns):
            full = before.input_tokens // 64
            assert after.blocks[:full] == before.blocks[:full]
            assert after.input_tokens > before.input_tokens + before.output_tokens
            if before.input_tokens % 64:
                assert after.blocks[full] != before.blocks[full]
        assert all(len(turn.blocks) == -(-turn.input_tokens // 64) for turn in turns)
    starts = Counter(turns[0].blocks[:2] for turns in sessions.values())
    assert len(starts) == 2, "two system prompts of two whole blocks"
    assert len({turns[0].blocks[2] for turns in sessions.values()}) == 60


def test_a_session_ends_before_its_context_does() -> None:
    chat = Chat(SHORT, turns_mean=1000, context_max=3000, block_tokens=64)
    made = chats(count=10, chat=chat)
    assert len(made) > 50
    assert all(a.input_tokens + a.output_tokens <= 3000 for a in made)


def test_sessions_of_a_trace_are_found_by_what_their_prompts_begin_with() -> None:
    blocks = [(0, 1, 2), (0, 9, 8), (0, 1, 5, 6), (0, 1, 5, 7), (0, 9, 4), (0, 3)]
    trace = [Arrival(float(n), 512 * len(ids) - 12, 1, ids, 512) for n, ids in enumerate(blocks)]
    assert [a.session for a in with_sessions(trace)] == ["s1", "s2", "s1", "s1", "s2", "s3"]
    unnamed = [Arrival(0.0, 1, 1), Arrival(0.0, 1, 1, (1,), 512, "mine")]
    assert list(with_sessions(unnamed)) == unnamed


def test_made_sessions_are_found_again() -> None:
    made = chats(count=50, chat=Chat(Apart(TokenRange(200, 400), TokenRange(5, 9)), block_tokens=64))
    bare = (Arrival(a.arrival_s, a.input_tokens, a.output_tokens, a.blocks, a.block_tokens) for a in made)
    pairs = {(one.session, other.session) for one, other in zip(made, with_sessions(bare), strict=True)}
    assert len(pairs) == len({mine for mine, _ in pairs}) == len({found for _, found in pairs}) == 50


def test_a_thinned_trace_keeps_its_hits() -> None:
    """What the sessions of a trace find of their own is independent of how many other sessions there are."""

    def ratio(workload: Iterable[Arrival]) -> float:
        oracle = LruOracle([])
        for arrival in workload:
            oracle.add(arrival.blocks)
        return oracle.hit_ratio()["unbounded"]

    by_turns = chats(count=600)
    whole = ratio(by_turns)
    assert whole > 0.4
    assert ratio(superposed(by_turns, 0.3, random.Random(2))) == pytest.approx(whole, abs=0.08)
    alone = [Arrival(a.arrival_s, a.input_tokens, a.output_tokens, a.blocks, a.block_tokens) for a in by_turns]
    assert ratio(superposed(alone, 0.3, random.Random(2))) < whole - 0.1


# Ticks


def test_a_tick_is_spread_until_the_next_one() -> None:
    ticks = [Arrival(at, 1, n + 1) for n, at in enumerate([0, 0, 0, 3, 3, 9, 9, 9])]
    spread = list(spread_ticks(ticks, random.Random(1)))
    assert [a.output_tokens for a in spread] == list(range(1, 9))
    assert is_ordered(spread)
    for a, tick in zip(spread, ticks, strict=True):
        assert tick.arrival_s <= a.arrival_s < tick.arrival_s + 3


def test_a_trace_that_ticks_comes_evenly_and_a_fine_one_stays_as_it_is() -> None:
    raw = [a.arrival_s for a in read_trace(MOONCAKE)]
    even = [a.arrival_s for a in spread_ticks(read_trace(MOONCAKE), random.Random(1))]
    assert cv(raw) > 2
    assert 0.7 < cv(even) < 1.4
    fine = list(itertools.islice(drawn(poisson(5, 1), SHORT, random.Random(1)), 100))
    assert list(spread_ticks(fine, random.Random(1))) == fine
    assert list(spread_ticks([], random.Random(1))) == []


# Lengths, tenants, and cutting


def test_requests_are_cut_to_the_context_and_their_blocks_with_them() -> None:
    long = Arrival(1.0, 2000, 900, (1, 2, 3, 4), 512, "s", "t", "c")
    short = Arrival(2.0, 10, 10)
    assert list(within_context([long, short], 1000)) == [Arrival(1.0, 499, 500, (1,), 512, "s", "t", "c"), short]
    assert list(within_context([long], 4000)) == [long]
    assert list(resized([long], 0.1, output_max=50)) == [Arrival(1.0, 200, 50, (1, 2, 3, 4), 52, "s", "t", "c")]


def test_tenants_are_mixed_in_the_order_of_time() -> None:
    a, b = ([Arrival(n * step, 1, 1) for n in range(10)] for step in (1.0, 1.7))
    mix = list(merged(labelled(a, "alice"), labelled(b, "bob", "batch")))
    assert is_ordered(mix)
    assert Counter(one.tenant for one in mix) == {"alice": 10, "bob": 10}
    assert {one.slo_class for one in mix if one.tenant == "bob"} == {"batch"}
    assert [one.tenant for one in mix[:2]] == ["alice", "bob"]


def test_quantiles_are_drawn_as_they_are_given() -> None:
    lengths = Quantiles([0, 50, 100], [10, 20, 1000])
    values = sorted(lengths.draw(random.Random(n)) for n in range(4000))
    assert 10 <= values[0] <= values[-1] <= 1000
    assert values[2000] == pytest.approx(20, abs=8)
    assert values[3000] == pytest.approx(510, rel=0.1)


def test_pairs_come_from_a_trace_or_from_lengths_alone(tmp_path: Path) -> None:
    (tmp_path / "lengths.csv").write_text("input_tokens,output_tokens\n10,1\n20,2\n")
    (tmp_path / "none.csv").write_text("input_tokens,output_tokens\n")
    assert Pairs.of_trace(str(tmp_path / "lengths.csv")).pairs == [(10, 1), (20, 2)]
    assert Pairs.of_trace(MOONCAKE, 1).pairs == [(6758, 500)]
    with pytest.raises(ConfigError, match="no requests"):
        Pairs.of_trace(str(tmp_path / "none.csv"))
