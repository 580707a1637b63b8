"""The GPUs file of `tandem plan`, and the command on small traces: what it writes, and what it says of bad input."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner, Result

from cli import plan_progress
from cli.main import app
from cli.plan_plots import around, goodput_rps
from cluster.planner_analytic import Analytic
from cluster.planner_file import read_offers
from cluster.planner_model import Layout
from cluster.planner_offers import Pool, Workload
from core.cost_file import write_cost_model
from core.cost_model import CostModel, StepCost
from core.errors import ConfigError
from core.request import Slo, WorkerRole

ROOT = Path(__file__).resolve().parents[3]
COST = CostModel(StepCost(0.02, 60e-6, 0.0, 100e-6, 1e-7), kv_token_bytes=300_000)


def written(folder: Path, tree: object) -> str:
    write_cost_model(COST, str(folder / "cost.json"))
    (folder / "gpus.yaml").write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
    return str(folder / "gpus.yaml")


def one_gpu(**changes: object) -> dict[str, Any]:
    gpu = {"name": "own", "memory_gib": 80, "tp": [1], "usd_per_hour": 2.0, "profile": "cost.json"}
    return {"model": {"weights_bytes": 14e9}, "gpus": [gpu | changes]}


def test_the_example_is_read_and_what_does_not_fit_is_left_out_with_by_how_much() -> None:
    offers, refused = read_offers(str(ROOT / "deploy/planning/gpus.yaml"))
    assert {str(offer) for offer in offers} >= {"h100-80g tp 4", "a100-80g tp 8"}
    assert all(offer.kv_tokens > 0 and offer.cost.kv_token_bytes == 327_680 for offer in offers)
    assert all("GB more than" in line for line in refused)


def test_profiles_bring_their_times_and_the_file_the_rest(tmp_path: Path) -> None:
    spot = {"usd_per_hour": 0.5, "interruptions_per_hour": 1, "away_s": 360}
    (offer,), refused = read_offers(written(tmp_path, one_gpu(spot=spot, link={"bandwidth": 1e9, "latency": 0.01})))
    assert (offer.layout, offer.cost.steps, refused) == (Layout(1, 1), COST.steps, [])
    assert offer.kv_tokens == int((0.9 * 80 * 2**30 - 14e9) / 300_000)
    assert (offer.link.bytes_per_s, offer.link.latency_s) == (1e9, 0.01)
    assert offer.spot is not None
    assert offer.spot.availability == pytest.approx(1 / 1.1)


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        (one_gpu(memory_gib=10), r"4\.3 GB more than 90% of 1 x 10\.7 GB"),
        (one_gpu(profile="nothing.json"), "nothing.json"),
        (one_gpu(memory_gib=None), "no GPU named 'own'"),
        (one_gpu(profile=None), "how fast"),
        (one_gpu(usd_per_hour=-1), r"gpus\.0\.usd_per_hour"),
        (one_gpu(tp=[0]), "1 or more"),
        (one_gpu(colour="red"), r"gpus\.0\.colour: unknown key; remove it or check its spelling$"),
        (
            {"model": {"config": "none.json"}, "gpus": [{"name": "h100-80g"}, {"name": "zx80"}]},
            "^no GPU named 'zx80' is known; choose one of",
        ),
        ({"gpus": []}, "gpus"),
        ("[1, 2", "neither YAML nor JSON"),
        ("3", "does not describe GPUs"),
        ({"model": {"config": "none.json"}, "gpus": [{"name": "h100-80g"}]}, r"none\.json"),
    ],
)
def test_files_that_cannot_be_used_say_what_to_change(tmp_path: Path, tree: object, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read_offers(written(tmp_path, tree))
    with pytest.raises(ConfigError, match="cannot read the GPUs"):
        read_offers(str(tmp_path / "elsewhere.yaml"))


def asked(folder: Path, *more: str, tree: object = None, rate: float = 20.0) -> tuple[Result, dict[str, Any]]:
    draw = np.random.default_rng(2)
    rows = zip(
        np.cumsum(draw.exponential(1 / rate, 250)), draw.integers(200, 1500, 250), draw.integers(2, 80, 250), strict=True
    )
    lines = [f"{at:.4f},{prompt},{answer}" for at, prompt, answer in rows]
    (folder / "trace.csv").write_text("\n".join(["arrival_s,input_tokens,output_tokens", *lines]))
    files = ["--trace", str(folder / "trace.csv"), "--gpus", written(folder, tree or one_gpu())]
    result = CliRunner().invoke(app, ["plan", *files, "--json", str(folder / "plan.json"), *more])
    path = folder / "plan.json"
    return result, json.loads(path.read_text()) if path.exists() else {}


def test_a_plan_is_written_as_promised(tmp_path: Path) -> None:
    result, report = asked(tmp_path, "--slo-ttft", "2", "--slo-tbt", "0.2", "--quick")
    assert result.exit_code == 0, result.output
    assert {"goodput_rps", "goodput_rps_per_gpu", "cost_usd_per_hour", "binding_limit", "confidence"} <= report.keys()
    assert {"role", "gpu", "tp", "pp", "replicas", "market"} <= report["pools"][0].keys()
    assert report["meets_slo"]
    assert report["cost_usd_per_hour"] == 2.0 * report["gpus"]
    assert report["goodput_rps"] >= 0.95 * report["demand_rps"]


def test_a_file_without_answers_is_told_how_long_they_are(tmp_path: Path) -> None:
    (tmp_path / "asked.csv").write_text("\n".join(["arrival_s,input_tokens", *(f"{n / 5},700" for n in range(250))]))
    files = ["--trace", str(tmp_path / "asked.csv"), "--gpus", written(tmp_path, one_gpu())]
    asked = ["plan", *files, "--slo-ttft", "2", "--slo-tbt", "0.2", "--quick", "--json", "-"]
    unsaid = CliRunner().invoke(app, asked)
    assert unsaid.exit_code == 2
    assert "--output-tokens" in unsaid.output
    few, many = (json.loads(CliRunner().invoke(app, [*asked, "--output-tokens", count]).stdout) for count in ("20", "2000"))
    assert few["meets_slo"]
    assert many["meets_slo"]
    assert few["cost_usd_per_hour"] < many["cost_usd_per_hour"]


def test_a_plan_that_takes_long_says_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_progress, "LINE_EVERY_S", 0.0)
    result, report = asked(tmp_path, "--slo-ttft", "2", "--slo-tbt", "0.2", "--seeds", "1", "--window", "5")
    assert report["meets_slo"], result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("tandem: planning for")]
    assert re.search(r"simulation 1 of about \d+ \(\d+ ", lines[0])
    assert re.search(r"simulation \d+ of about \d+, about \d:\d\d left \(.* at \S+/s, part 0\)$", lines[-1])


def test_the_router_in_the_loop_agrees_on_a_demand_that_is_easy(tmp_path: Path) -> None:
    result, report = asked(tmp_path, "--slo-ttft", "2", "--slo-tbt", "0.2", "--seeds", "1", "--window", "5")
    assert result.exit_code == 0, result.output
    assert report["judged_by"] == "simulation"
    assert report["attainment"]["joint"] >= 0.9


def test_limits_that_cannot_be_met_name_what_binds_and_the_nearest(tmp_path: Path) -> None:
    result, report = asked(tmp_path, "--slo-ttft", "2", "--slo-tbt", "0.01", "--quick")
    assert result.exit_code == 1
    assert "tbt binds" in result.stderr
    assert (report["pools"], report["binding_limit"], report["meets_slo"]) == ([], "tbt", False)
    assert 0.02 < report["nearest"]["slo_tbt_s"] < 0.05
    assert report["nearest"]["pools"]


def test_pictures_of_a_plan_are_written_where_they_were_asked_for(tmp_path: Path) -> None:
    result, report = asked(tmp_path, "--slo-ttft", "2", "--slo-tbt", "0.2", "--quick", "--plots", str(tmp_path / "pictures"))
    assert result.exit_code == 0, result.output
    picture = (tmp_path / "pictures" / "cost_goodput.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert "cost_goodput.png" in result.stderr
    assert (tmp_path / "pictures" / "pools.png").exists() == (len(report["pools"]) == 2)
    (tmp_path / "file").write_text("")
    refused, _ = asked(tmp_path, "--slo-ttft", "2", "--slo-tbt", "0.2", "--quick", "--plots", str(tmp_path / "file"))
    assert "cannot write" in refused.output


def test_goodput_around_a_plan_is_highest_near_it_and_needs_what_can_be_had(tmp_path: Path) -> None:
    offers, _ = read_offers(written(tmp_path, one_gpu(count=8)))
    draw = np.random.default_rng(3)
    lengths = [draw.integers(200, 1500, 200).astype(float), draw.integers(20, 200, 200).astype(float)]
    workload = Workload(lengths[0], lengths[1], 20.0, 1.0)
    quick = Analytic(workload, Slo(ttft_s=2.0, tbt_s=0.1))
    pools = (Pool(WorkerRole.PREFILL, offers[0], 2), Pool(WorkerRole.DECODE, offers[0], 2))
    cells = around(pools, workload, 0.9, quick)
    assert max(p + d for p, d in cells) == 8
    assert cells[1, 1] > cells[1, 5], "decode workers that wait for prompts"
    rate = goodput_rps(pools, workload, 0.9, quick)
    assert quick(pools, 0.99 * rate).joint >= 0.9 > quick(pools, 1.01 * rate).joint
    assert around(pools[:1], workload, 0.9, quick) == {}


def test_too_few_gpus_are_named(tmp_path: Path) -> None:
    result, report = asked(tmp_path, "--slo-ttft", "2", "--slo-tbt", "0.2", "--quick", tree=one_gpu(count=1), rate=200.0)
    assert result.exit_code == 1
    assert "own (on demand): 1 GPUs can be had" in report["binding_limit"]
    assert report["gpus"] == 1
    assert 0 < report["goodput_rps"] < 200
