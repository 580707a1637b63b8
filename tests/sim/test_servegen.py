"""Workloads made of clients, each with rates, gaps and lengths of its own."""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Sequence
from pathlib import Path

import pytest

from core.errors import ConfigError
from sim.servegen import Client, ServeGen, Window
from sim.workload import Arrival
from sim.workload_lengths import Apart, TokenRange


def cv(times: Sequence[float]) -> float:
    gaps = [b - a for a, b in itertools.pairwise(times)]
    return statistics.pstdev(gaps) / statistics.mean(gaps)


def is_ordered(workload: Sequence[Arrival]) -> bool:
    return all(a.arrival_s <= b.arrival_s for a, b in itertools.pairwise(workload))


def clients() -> ServeGen:
    steady = [Window(n * 600.0, 2.0, "Gamma", 4.0) for n in range(3)]
    bursty = [Window(0.0, 1.0, "Weibull", 0.5), Window(1200.0, 5.0, "Weibull", 0.5)]
    one, other = Apart(TokenRange(5, 5), TokenRange(7, 7)), Apart(TokenRange(50, 50), TokenRange(70, 70))
    return ServeGen([Client("a", steady, [(0.0, one), (1200.0, other)]), Client("b", bursty, [(600.0, other)])])


def test_clients_keep_their_rates_gaps_and_lengths() -> None:
    sent = list(clients().arrivals(0.0, 1800.0, random.Random(1)))
    assert is_ordered(sent)
    mine: dict[str, list[Arrival]] = {name: [a for a in sent if a.tenant == name] for name in "ab"}
    assert len(mine["a"]) == pytest.approx(3600, rel=0.05)
    assert cv([a.arrival_s for a in mine["a"]]) == pytest.approx(0.5, abs=0.05)
    assert {a.input_tokens for a in mine["a"] if a.arrival_s < 1200} == {5}
    assert {a.output_tokens for a in mine["a"] if a.arrival_s >= 1200} == {70}
    assert not [a for a in mine["b"] if 600 <= a.arrival_s < 1200]
    late = [a.arrival_s for a in mine["b"] if a.arrival_s >= 1200]
    assert len(late) == pytest.approx(3000, rel=0.15)
    assert cv(late) == pytest.approx(5**0.5, rel=0.15)
    assert {a.input_tokens for a in mine["b"]} == {50}, "the nearest lengths there are"
    assert (
        sent
        == list(clients().arrivals(0.0, 1800.0, random.Random(1)))
        != list(clients().arrivals(0.0, 1800.0, random.Random(2)))
    )
    part = list(clients().arrivals(1500.0, 1560.0, random.Random(1)))
    assert len(part) == pytest.approx(420, abs=150)
    assert all(0 <= a.arrival_s < 60 for a in part)


RATES = "window_start_s,client_id,rate_rps,iat_dist,shape\n0,7,2.5,Gamma,1.0\n600,7,2.5,Weibull,1.0\n0,8,1,Gamma,1\n"
LENGTHS = "client_id,t_s,field,p0,p50,p100\n7,0,input_tokens,1,3,9\n7,0,output_tokens,2,3,4\n7,0,reason_ratio,0,0,1\n"


def tables(tmp_path: Path, rates: str = RATES, lengths: str = LENGTHS) -> ServeGen:
    (tmp_path / "rates").write_text(rates)
    (tmp_path / "lengths").write_text(lengths)
    return ServeGen.read(str(tmp_path / "rates"), str(tmp_path / "lengths"))


def test_clients_are_read_from_the_published_tables(tmp_path: Path) -> None:
    read = tables(tmp_path)
    assert ([client.name for client in read.clients], read.without_lengths) == (["7"], 1)
    sent = list(read.arrivals(0.0, 1200.0, random.Random(1)))
    assert len(sent) == pytest.approx(3000, rel=0.1)
    assert {a.output_tokens for a in sent} == {2, 3, 4}


@pytest.mark.parametrize(
    ("rates", "lengths", "why"),
    [
        ("a,b\n", LENGTHS, "rates is no table of ServeGen's clients: it has no column window_start_s"),
        (RATES + "600,9,none,Gamma,1\n", LENGTHS, r"rates, row 4 \(line 5\), column rate_rps: 'none' is no number"),
        (RATES + "600,9,1,Pareto,1\n", LENGTHS, r"row 4 .*, column iat_dist: 'Pareto' is none of Gamma, Weibull"),
        (RATES + "0,7,1,Gamma,1\n", LENGTHS, r"row 4 .*, column window_start_s: .* order of time"),
        (RATES + "0,9,1\n", LENGTHS, r"row 4 \(line 5\): the row has 3 values"),
        (RATES, LENGTHS + "7,0,input_tokens,5,x,9\n", r"lengths, row 4 \(line 5\), column p50: 'x' is no number"),
        (RATES, LENGTHS + "7,0,input_tokens,5,4,9\n", r"row 4 .*, column p0: quantiles must not fall"),
    ],
)
def test_what_is_wrong_with_a_table_is_said_with_its_place(tmp_path: Path, rates: str, lengths: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        tables(tmp_path, rates, lengths)
