"""What a trace leaves open is filled in; sessions share their history; requests beyond the context are named."""

from __future__ import annotations

import json
from itertools import islice, pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.main import app
from core.config import Config
from core.errors import ConfigError
from sim.run import simulate
from sim.sweep import MODEL
from sim.trace_arrivals import Missing, arrivals_of, context_of
from sim.workload import Arrival
from sim.workload_sessions import with_histories

SHAPE = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_hidden_layers": 2,
    "vocab_size": 1000, "max_position_embeddings": 300,
}  # fmt: skip
ROOFLINE = {"roofline": {"model": "config.json", "gpu": "H100"}}
POOLS = [{"role": "prefill"}, {"role": "decode"}]


def written(tmp_path: Path, text: str) -> str:
    (tmp_path / "trace.csv").write_text(text)
    return str(tmp_path / "trace.csv")


def test_lengths_alone_come_at_a_rate_with_the_variation_that_is_asked_for(tmp_path: Path) -> None:
    path = written(tmp_path, "input_tokens,output_tokens\n" + "20,5\n" * 3000)
    spread = {}
    for cv in (1.0, 3.0):
        found = list(arrivals_of(path, Missing(4.0, cv, seed=2)))
        gaps = [later.arrival_s - earlier.arrival_s for earlier, later in pairwise(found)]
        mean = sum(gaps) / len(gaps)
        spread[cv] = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5 / mean
        assert mean == pytest.approx(0.25, rel=0.2)
        assert found == list(arrivals_of(path, Missing(4.0, cv, seed=2)))
    assert spread[1.0] == pytest.approx(1.0, abs=0.1)
    assert spread[3.0] == pytest.approx(3.0, abs=0.6)
    with pytest.raises(ConfigError, match=r"no times of arrival; give a rate: sim\.rate_rps"):
        list(arrivals_of(path, Missing()))


def test_a_file_without_answers_gets_those_of_the_configuration_and_one_with_them_keeps_its_own(tmp_path: Path) -> None:
    path = written(tmp_path, "query_id,arrival_s,input_tokens\n0,1.5,512\n")
    assert list(arrivals_of(path, Missing(output_tokens=7))) == [Arrival(0.0, 512, 7)]
    path = written(tmp_path, "arrival_s,input_tokens,output_tokens\n2,512,3\n")
    assert list(arrivals_of(path, Missing(9.0, 1.0, 7))) == [Arrival(0.0, 512, 3)]


def test_a_turn_begins_with_the_turn_before_and_a_shorter_one_anew() -> None:
    lengths = {"a": (100, 150, 40, 60), "b": (100,)}
    turns = [Arrival(0.0, tokens, 5, session=name) for name, each in lengths.items() for tokens in each]
    turns += [Arrival(0.0, 100, 5, session="a", tenant="other"), Arrival(0.0, 100, 5)]
    names = [each.blocks for each in with_histories(turns)]
    first, second, third, fourth, *others, none = names
    assert first == second != third == fourth
    assert len({first, third, *others}) == 4
    assert none == ()


def test_sessions_of_a_trace_find_their_prefix_in_a_simulation(tmp_path: Path) -> None:
    """Each turn is 64 tokens longer than the one before: of 64 + 128 + 192 + 256 tokens 384 were there."""
    engine = {"block_size": 16, "kv_bytes": "4MiB", "max_running": 16, "max_step_tokens": 128}
    config = Config.model_validate({"engine": engine, "sim": {"pools": POOLS}})
    rows = [f"{turn * 20 + chat / 5},{64 * (turn + 1)},8,chat-{chat},t" for turn in range(4) for chat in range(5)]
    path = written(tmp_path, "arrival_s,input_tokens,output_tokens,session,tenant\n" + "\n".join(rows))
    for kind in ("counted", "exact"):
        tree = config.model_copy(update={"sim": config.sim.model_copy(update={"engine": kind})})
        report = simulate(tree, arrivals_of(path, Missing()), "prefix_aware", 1, model=MODEL).report
        assert report["prefix_hit_ratio"] == pytest.approx(384 / 640, abs=0.06), "but for the last block of each prompt"


def sim(tmp_path: Path, tree: dict[str, object], *more: str):
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    (tmp_path / "sim.yaml").write_text(json.dumps(tree).replace("config.json", str(tmp_path / "config.json")))
    return CliRunner().invoke(app, ["sim", "--config", str(tmp_path / "sim.yaml"), *more])


def test_requests_beyond_the_context_of_the_model_are_named_and_a_longer_one_can_be_set(tmp_path: Path) -> None:
    path = written(tmp_path, "arrival_s,input_tokens,output_tokens\n0,200,50\n1,290,50\n")
    tree = {"sim": {"profile": ROOFLINE, "pools": POOLS}}
    refused = sim(tmp_path, tree, "--trace", path)
    assert refused.exit_code == 2
    assert "row 2 (line 3), column output_tokens: 290 + 50 tokens are more than the context of 300" in refused.output
    assert sim(tmp_path, tree | {"model": {"max_model_len": 400}}, "--trace", path).exit_code == 0
    assert context_of(Config()) is None


def test_a_gpu_that_nobody_knows_is_refused_though_pools_name_others(tmp_path: Path) -> None:
    pools = [{"role": "prefill", "gpu": "H100"}, {"role": "decode", "gpu": "H100"}]
    tree = {"sim": {"profile": {"roofline": ROOFLINE["roofline"] | {"gpu": "H1000"}}, "pools": pools}}
    refused = sim(tmp_path, tree)
    assert refused.exit_code == 2
    assert "no GPU named 'H1000'" in refused.output


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--rate-scale", "nan"), "rate scale must be a number above 0"),
        (("--rate-scale", "inf"), "rate scale must be a number above 0"),
        (("--json", "/nowhere/out.json"), "there is no folder /nowhere"),
        (("--report", "/"), "it is a folder"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_runs(tmp_path: Path, more: tuple[str, str], said: str) -> None:
    tree = {"sim": {"profile": ROOFLINE, "pools": POOLS, "rate_rps": 5, "duration_s": 2, "input_tokens": 20}}
    done = sim(tmp_path, tree, *more)
    assert done.exit_code == 2
    assert said in done.output


def test_made_arrivals_may_be_bursty() -> None:
    def goodput(cv: float) -> float:
        tree = {"pools": POOLS, "rate_rps": 20, "duration_s": 20, "input_tokens": 64, "output_tokens": 8, "arrival_cv": cv}
        return simulate(Config.model_validate({"sim": tree}), seed=3, model=MODEL).report["ttft_s"]["p99"]

    assert goodput(6.0) > 1.5 * goodput(1.0)


def test_sessions_are_read_as_a_stream() -> None:
    endless = (Arrival(float(n), 10, 1, session=f"s{n % 3}") for n in iter(int, 1))
    assert len(list(islice(with_histories(endless), 5))) == 5
