"""`tandem profile` measures what would be served, and a cluster believes it, or refuses it by name."""

from __future__ import annotations

import json
import subprocess
import urllib.request
from pathlib import Path

import pytest
from cluster_up import TANDEM, eventually, tandem_up
from tiny_llama import tiny_llama

from core.cost_file import read_cost_model, write_cost_model
from core.cost_model import CostModel, LinkCost, StepCost, StepShape

pytestmark = [pytest.mark.service, pytest.mark.timeout(180)]

SMALL = "model: {{path: {model}, max_model_len: 160}}\nengine: {{max_step_tokens: 32, max_running: 4, kv_bytes: 4MiB}}\n"
COST = CostModel(StepCost(0.004, 2e-4, 3e-8, 5e-4, 1e-6), 5120, {"shm": LinkCost(1e-5, 4e9)}, "ab" * 16)


def tandem(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([TANDEM, *arguments], capture_output=True, text=True, timeout=150, check=False)


def test_what_was_measured_is_a_cost_model_of_this_model(tmp_path: Path) -> None:
    (tmp_path / "tandem.yaml").write_text(SMALL.format(model=tiny_llama()))
    out = tmp_path / "cost.json"
    done = tandem("profile", "--config", str(tmp_path / "tandem.yaml"), "--json", str(out))
    assert done.returncode == 0, done.stderr
    model = read_cost_model(str(out))
    assert model.steps.step_s(StepShape(32, 528)) > 0
    assert model.steps.step_s(StepShape(0, 0, 4, 400)) > 0
    assert set(model.links) == {"shm", "tcp", "grpc"}, done.stderr
    assert model.links["shm"].bytes_per_s > 1e7
    assert model.samples >= 15
    assert 0 <= model.median_error <= model.p90_error
    assert 0 < model.heldout_median_error <= model.heldout_p90_error
    assert (len(bytes.fromhex(model.fingerprint)), model.kv_token_bytes) == (16, 2 * 2 * 2 * 8 * 4)
    assert "relative error" in done.stdout
    assert not list(Path("/dev/shm").glob("tandem-profile-*"))


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--json", "cost.json", "--from-gpu", "/nowhere/perf_model.csv"), "cannot read the GPU profile"),
        (("--json", "/nowhere/cost.json", "--from-gpu", "/nowhere/perf_model.csv"), "cannot write /nowhere/cost.json"),
        (("--json", "cost.json", "--from-gpu", "x.csv", "--select", "h100"), "--select must look like"),
        (("--json", "cost.json", "--model", "/nowhere"), "/nowhere"),
    ],
)
def test_what_cannot_be_profiled_is_said(arguments: tuple[str, ...], why: str) -> None:
    done = tandem("profile", *arguments)
    assert done.returncode == 2, done.stderr
    assert why in done.stderr


def test_memory_too_small_to_measure_anything_is_said(tmp_path: Path) -> None:
    (tmp_path / "tandem.yaml").write_text(f"model: {{path: {tiny_llama()}}}\nengine: {{kv_bytes: 64KiB, block_size: 128}}\n")
    done = tandem("profile", "--config", str(tmp_path / "tandem.yaml"), "--json", str(tmp_path / "cost.json"))
    assert done.returncode == 2, done.stderr
    assert "raise engine.kv_bytes" in done.stderr


def saved(tmp_path: Path, fingerprint: str) -> Path:
    path = tmp_path / "cost.json"
    write_cost_model(CostModel(COST.steps, COST.kv_token_bytes, COST.links, fingerprint), str(path))
    return path


@pytest.mark.parametrize(
    ("content", "why"),
    [(None, "No such file"), ("{}", "is no cost model"), (json.dumps(COST.to_json()), "was measured on the model abab")],
)
def test_a_cluster_does_not_start_with_a_file_that_is_not_for_it(tmp_path: Path, content: str | None, why: str) -> None:
    path = tmp_path / "cost.json"
    if content is not None:
        path.write_text(content)
    config = f"router: {{cost_model: {path}}}\nengine: {{kv_bytes: 4MiB}}\nstore: {{nodes: 0}}\n"
    (tmp_path / "tandem.yaml").write_text(config)
    done = tandem("up", "--launcher", "local", "--colocated", "1", "--config", str(tmp_path / "tandem.yaml"))
    assert done.returncode == 2, done.stderr[-2000:]
    assert why in done.stderr
    assert str(path) in done.stderr
    assert "tandem profile" in done.stderr
    assert "tandem ready" not in done.stdout


def test_a_cluster_believes_a_file_and_shows_how_far_its_workers_departed_from_it(tmp_path: Path) -> None:
    config = f"router: {{cost_model: {saved(tmp_path, '')}, policy: goodput}}\nengine: {{kv_bytes: 16MiB}}\n"
    with tandem_up(tmp_path / "up", "--colocated", "0", "--prefill", "1", "--decode", "1", config=config) as cluster:
        bench = ("bench", "--grpc", cluster.grpc, "--concurrency", "4", "--requests", "40", "--duration", "60")
        assert tandem(*bench, "--input-tokens", "5-300", "--output-tokens", "2-20").returncode == 0

        def drift() -> list[float]:
            with urllib.request.urlopen(f"http://{cluster.http}/metrics", timeout=10) as reply:
                lines = reply.read().decode().splitlines()
            return [float(line.split()[-1]) for line in lines if line.startswith("tandem_router_cost_drift_ratio{")]

        assert eventually(drift)[0] > 0, "a worker has learned, and is compared"
