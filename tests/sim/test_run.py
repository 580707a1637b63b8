"""Whole simulations: the same seed, the same bytes; what comes out has the agreed shape and adds up; bad input is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from cli.main import app
from core.config import Config, load
from core.errors import ConfigError
from core.tally import GAP_STEP
from router.policies import POLICIES
from sim.faults import Fault, read_faults
from sim.run import simulate
from sim.sweep import MODEL
from sim.workload import Arrival

POOLS = [{"role": "prefill", "count": 2}, {"role": "decode", "count": 2}, {"role": "colocated", "count": 1}]
TREE = {
    "engine": {"block_size": 16, "kv_bytes": "4MiB", "max_running": 16, "max_step_tokens": 128},
    "sim": {"pools": POOLS, "slo": {"ttft_s": 0.5, "tbt_s": 0.02}, "rate_rps": 8, "duration_s": 10, "input_tokens": 100,
            "output_tokens": 30},
}  # fmt: skip
CONFIG = Config.model_validate(TREE)
NAMED = [Arrival(0.1 * n, 200 + n, 20, (n % 3, n % 3 + 10, *range(100 * n, 100 * n + 3)), 64) for n in range(60)]
SHAPE = {
    "requests", "completed", "rejected", "failed", "duration_s", "ttft_s", "tpot_s", "tbt_s", "itl_s", "e2e_s", "attainment",
    "goodput_rps", "goodput_mean_rps", "output_tokens_per_s", "gpus", "goodput_rps_per_gpu", "cost_usd", "prefix_hit_ratio",
    "events", "wall_s", "policy", "seed",
}  # fmt: skip


def bytes_of(**more):
    result = simulate(CONFIG, NAMED, more.pop("policy", "goodput"), more.pop("seed", 1), model=MODEL, **more)
    return json.dumps(result.report | {"wall_s": 0})


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_the_same_seed_gives_the_same_bytes(policy):
    faults = [Fault(2.0, "kill", "decode-1")]
    assert bytes_of(policy=policy, faults=faults) == bytes_of(policy=policy, faults=faults)


def test_another_process_with_other_hashes_gives_the_same_bytes():
    """Nothing goes by the order of a set."""
    code = (
        "import json; from core.config import Config; from sim.run import simulate; from sim.sweep import MODEL, story_of\n"
        "for seed in range(4):\n"
        "    told = story_of(seed)\n"
        "    config = Config.model_validate(told.tree)\n"
        "    run = simulate(config, told.arrivals, told.policy, seed, faults=told.faults, model=MODEL)\n"
        "    print(json.dumps(run.report | {'wall_s': 0}))\n"
    )
    said = [
        subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True)
        for seed in ("1", "2")
    ]
    assert said[0].stdout == said[1].stdout != b""


def test_checks_change_nothing_and_another_seed_may():
    assert bytes_of() == bytes_of(checks=True)
    assert bytes_of(policy="random", seed=1) != bytes_of(policy="random", seed=2)


def test_the_report_has_the_agreed_shape_and_adds_up():
    report = simulate(CONFIG, NAMED, "least_load", 1, model=MODEL).report
    assert report.keys() >= SHAPE
    assert report["requests"] == report["completed"] + report["rejected"] + report["failed"] == len(NAMED)
    assert report["attainment"].keys() == {"ttft", "tbt", "tpot", "joint", "joint_mean"}
    assert report["goodput_rps"] == pytest.approx(report["attainment"]["joint"] * len(NAMED) / report["duration_s"])
    assert report["gpus"] == 5
    assert report["prefix_hit_ratio"] > 0.2


@pytest.mark.parametrize("engine", ["counted", "exact"])
@pytest.mark.parametrize("pools", [POOLS[:2], POOLS[2:]], ids=["split", "colocated"])
def test_of_an_answer_of_one_token_it_is_known_what_its_prompt_took(engine, pools):
    """Said before the token that ends it: nobody listens after it."""
    worlds = []
    config = Config.model_validate(TREE | {"sim": TREE["sim"] | {"pools": pools, "engine": engine}})
    arrivals = [Arrival(0.5 * n, 100, 1 + n % 2) for n in range(4)]
    assert simulate(config, arrivals, "least_load", 1, model=MODEL, prepare=worlds.append).report["completed"] == 4
    explained = [worlds[0].routers[0].dispatcher.placer.decisions.explain(f"r{n}") for n in range(4)]
    took = [each.outcome.timing.prefill_s for each in explained if each.outcome is not None]
    assert took == pytest.approx([took[1]] * 4)
    assert took[1] > 0


def test_exact_and_counted_engines_agree_where_memory_is_plenty():
    def of(engine: str) -> dict:
        sim = TREE["sim"] | {"engine": engine, "pools": POOLS[:2]}
        tree = TREE | {"sim": sim, "engine": TREE["engine"] | {"kv_bytes": "64MiB"}}
        return simulate(Config.model_validate(tree), NAMED, "least_load", 1, model=MODEL).report

    counted, exact = of("counted"), of("exact")
    for key in ("ttft_s", "tpot_s", "tbt_s", "e2e_s"):
        assert counted[key]["p50"] == pytest.approx(exact[key]["p50"], rel=0.02)
        assert counted[key]["p99"] == pytest.approx(exact[key]["p99"], rel=0.05)
    assert counted["itl_s"]["p50"] == pytest.approx(exact["itl_s"]["p50"], rel=GAP_STEP - 1 + 0.01)


def test_a_rate_scale_shortens_every_gap_alike():
    slow, fast = (simulate(CONFIG, NAMED, "least_load", 1, rate_scale=x, model=MODEL).report for x in (1.0, 4.0))
    assert fast["requests"] == slow["requests"]
    assert fast["duration_s"] < slow["duration_s"]
    assert fast["ttft_s"]["mean"] > slow["ttft_s"]["mean"]


def test_an_overloaded_cluster_refuses_and_counts_it_as_missed():
    tree = TREE | {"router": {"max_queue": 2}, "sim": TREE["sim"] | {"pools": POOLS[:2]}}
    report = simulate(Config.model_validate(tree), NAMED, "least_load", 1, rate_scale=50, model=MODEL).report
    assert report["rejected"] > 0
    assert report["attainment"]["joint"] <= report["completed"] / report["requests"]


@pytest.mark.parametrize(
    ("sim", "said"),
    [
        ({"pools": [{"role": "prefill"}]}, "needs prefill and decode workers"),
        ({"pools": [{"role": "decode", "kv_bytes": 2**16}, {"role": "prefill"}], "profile": "/nowhere.json"}, "/nowhere.json"),
        ({}, "sim.profile is missing"),
        ({"rate_rps": 0, "profile": "/nowhere.json"}, "/nowhere.json"),
    ],
)
def test_what_cannot_be_run_is_said(sim, said):
    config = Config.model_validate({"sim": sim})
    with pytest.raises(ConfigError, match=said):
        simulate(config, NAMED)


def test_requests_that_no_worker_holds_are_named():
    with pytest.raises(ConfigError, match=r"request 0 has 90000 \+ 1 tokens"):
        simulate(CONFIG, [Arrival(0.0, 90_000, 1)], model=MODEL)


def test_a_worker_without_room_for_two_blocks_says_by_how_much():
    tree = TREE | {"engine": {"block_size": 256, "kv_bytes": 2**16}}
    with pytest.raises(ConfigError, match="458752 bytes are missing"):
        simulate(Config.model_validate(tree), NAMED, model=MODEL)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}", "list of faults"),
        ("- {kind: kill, target: decode-0}", "fault 1: needs at_s and kind"),
        ("- {at_s: 1, kind: flood}", "'flood' is not known"),
        ("- {at_s: 1, kind: kill, target: decode-9}", "no worker or store of this cluster"),
        ("- {at_s: -1, kind: kill, target: decode-0}", "at_s must be a number"),
        ("- {at_s: 1, kind: slow, target: decode-0, share: 0}", "share must be above 0"),
        ("- {at_s: 1, kind: kill, target: decode-0, colour: red}", "colour"),
        ("time_ms,event,node\nsoon,add,a\n", "line 2"),
    ],
)
def test_faults_that_cannot_be_used_are_named(tmp_path, text, said):
    path = tmp_path / "faults.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_faults(str(path), ["decode-0"])


def test_a_spot_trace_takes_workers_away_and_gives_places_back(tmp_path):
    path = tmp_path / "spot.csv"
    path.write_text("time_ms,event,node\n0,add,a\n0,add,b\n5000,remove,a\n9000,add,c\n12000,remove,c\n")
    faults = read_faults(str(path), ["decode-0", "decode-1", "prefill-0"])
    assert [(fault.at_s, fault.kind, fault.target) for fault in faults] == [
        (5.0, "notice", "decode-0"), (9.0, "add", "decode-0"), (12.0, "notice", "decode-0"),
    ]  # fmt: skip


def test_an_empty_place_stays_empty_until_it_is_filled_again():
    tree = TREE | {"sim": TREE["sim"] | {"notice_s": 0.5, "start_s": 0.5}}
    gone = [Fault(1.0, "notice", f"prefill-{n}", refill=False) for n in range(2)]
    gone += [Fault(1.0, "notice", "colocated-0", refill=False)]
    back = [Fault(4.0, "add", "prefill-0")]
    config = Config.model_validate(tree)
    empty = simulate(config, NAMED, "least_load", 1, faults=gone, checks=True, model=MODEL).report
    filled = simulate(config, NAMED, "least_load", 1, faults=gone + back, checks=True, model=MODEL).report
    assert empty["completed"] < filled["completed"] == len(NAMED)


def test_the_verb_writes_what_it_found(tmp_path):
    profile = tmp_path / "model.json"
    profile.write_text(json.dumps(MODEL.to_json()))
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,input_tokens,output_tokens\n" + "".join(f"{n / 5},{50 + n},20\n" for n in range(20)))
    config = tmp_path / "sim.yaml"
    config.write_text(json.dumps(TREE | {"sim": TREE["sim"] | {"profile": str(profile)}}))
    out = tmp_path / "out.json"
    asked = ["sim", "--config", str(config), "--trace", str(trace), "--policy", "goodput", "--seed", "3", "--json", str(out)]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    report = json.loads(out.read_text())
    assert (report["requests"], report["policy"], report["seed"]) == (20, "goodput", 3)
    assert load(str(config)).sim.pools[0].role == "prefill"
    again = CliRunner().invoke(app, [*asked[:-1], "-"])
    assert json.loads(again.stdout) | {"wall_s": 0} == report | {"wall_s": 0}


def test_the_verb_says_what_is_wrong(tmp_path):
    config = tmp_path / "sim.yaml"
    config.write_text("sim: {pools: [{role: store}]}")
    done = CliRunner().invoke(app, ["sim", "--config", str(config)])
    assert done.exit_code == 2
    assert "sim.pools.0.role" in done.output
