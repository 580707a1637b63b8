"""`tandem up` with local processes: what it says, what it serves, and that nothing is left whatever ends it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_up import TANDEM, Cluster, eventually, tandem_up
from process_family import LOOPBACK, alive, family, listening, shared_by, shared_memory

pytestmark = [pytest.mark.service, pytest.mark.timeout(180)]

CONFIG = "engine: {kv_bytes: 8MiB}\ncluster: {heartbeat_s: 0.2, grace_s: 5}\n"


def tandem(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([TANDEM, *arguments], capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with tandem_up(tmp_path_factory.mktemp("up"), config=CONFIG) as running:
        yield running


def test_status_has_its_documented_shape(cluster: Cluster) -> None:
    cluster.only("store")  # the one that a cluster does not wait for
    status = cluster.status()
    assert status["model"] == "demo"
    assert {w["role"] for w in status["workers"]} == {"router", "prefill", "decode", "store"}
    for worker in status["workers"]:
        assert worker["state"] == "ready"
        assert worker["epoch"] == 1
        os.kill(worker["pid"], 0)
        assert set(worker["blocks"]) == {"total", "free", "cached", "active"}
        assert {"id", "node", "grpc", "metrics", "leases_open", "running", "waiting"} <= set(worker)
    table = tandem("status", "--grpc", cluster.grpc)
    assert "prefill-0" in table.stdout


def test_generate_answers_in_text_and_in_its_documented_shape(cluster: Cluster) -> None:
    arguments = ("generate", "def add(a, b):\n", "--max-tokens", "12", "--grpc", cluster.grpc)
    answer = json.loads(tandem(*arguments, "--json").stdout)
    assert answer["usage"]["completion_tokens"] == len(answer["token_ids"]) == 12
    assert answer["placement"] == {"prefill": "prefill-0", "decode": "decode-0"}
    parts = {"queue", "prefill", "handoff_wait", "transfer", "first_decode", "ttft", "tpot", "total"}
    assert parts <= set(answer["timing_s"])
    assert answer["timing_s"]["ttft"] <= answer["timing_s"]["total"]
    assert answer["failovers"] == 0
    assert tandem(*arguments).stdout == answer["text"] + "\n"


@pytest.mark.parametrize("front", ["grpc", "url"])
def test_bench_measures_both_fronts(cluster: Cluster, front: str, tmp_path: Path) -> None:
    where = ["--grpc", cluster.grpc] if front == "grpc" else ["--url", f"http://{cluster.http}"]
    load = ["--rate", "8", "--arrivals", "constant", "--duration", "1", "--input-tokens", "24", "--output-tokens", "6"]
    report_path = tmp_path / "report.json"
    done = tandem("bench", *where, *load, "--ttft-slo", "30", "--tbt-slo", "0.000001", "--json", str(report_path))
    assert done.returncode == 0, done.stderr
    report = json.loads(report_path.read_text())
    assert (report["requests"], report["completed"], report["rejected"], report["failed"]) == (8, 8, 0, 0)
    assert report["attainment"] == {"ttft": 1.0, "tbt": 0.0, "tpot": 1.0, "joint": 0.0, "joint_mean": 1.0}
    assert report["ttft_s"]["p50"] <= report["ttft_s"]["p99"] <= report["e2e_s"]["p99"]
    assert report["output_tokens_per_s"] > 0


def test_bench_replays_a_trace_faster_than_it_was(cluster: Cluster, tmp_path: Path) -> None:
    trace, report_path = tmp_path / "trace.csv", tmp_path / "report.json"
    trace.write_text("arrival_s,input_tokens,output_tokens\n" + "".join(f"{n},{10 + n},{2 + n}\n" for n in range(8)))
    replay = ["--trace", str(trace), "--speed", "10", "--duration", "0.65", "--output-tokens", "4"]
    done = tandem("bench", "--grpc", cluster.grpc, *replay, "--json", str(report_path))
    assert done.returncode == 0, done.stderr
    report = json.loads(report_path.read_text())
    assert report["completed"] == report["requests"] == 7
    tokens = report["output_tokens_per_s"] * report["duration_s"]
    assert round(tokens) == 2 + 3 + 4 * 5


def test_bench_closes_the_loop_without_a_rate(cluster: Cluster) -> None:
    load = ["--concurrency", "2", "--requests", "5", "--input-tokens", "16", "--output-tokens", "4", "--json", "-"]
    report = json.loads(tandem("bench", "--grpc", cluster.grpc, *load).stdout)
    assert report["completed"] == 5


def test_nothing_listens_beyond_this_machine(cluster: Cluster) -> None:
    addresses = listening(family(cluster.process.pid))
    assert addresses
    assert addresses <= LOOPBACK


def test_an_address_in_use_is_refused_before_anything_starts(cluster: Cluster) -> None:
    began = time.monotonic()
    done = tandem("up", "--launcher", "local", "--grpc", cluster.grpc)
    assert done.returncode == 2
    assert f"router.grpc cannot listen on {cluster.grpc}" in done.stderr
    assert time.monotonic() - began < 20


def test_a_drained_worker_is_succeeded(cluster: Cluster) -> None:
    done = tandem("drain", "decode-0", "--deadline", "20", "--grpc", cluster.grpc)
    assert done.returncode == 0, done.stderr
    eventually(lambda: [w["id"] for w in cluster.status()["workers"] if w["role"] == "decode"] == ["decode-1"], 60)
    answer = eventually(lambda: tandem("generate", "x", "--max-tokens", "4", "--json", "--grpc", cluster.grpc).stdout)
    assert json.loads(answer)["placement"]["decode"] == "decode-1"


def test_down_ends_it_and_leaves_nothing(cluster: Cluster) -> None:
    """Last of this cluster."""
    pids = family(cluster.process.pid)
    assert len(pids) == 5
    eventually(lambda: shared_by(pids) <= shared_memory(), 40)  # what others mapped of the worker that was drained goes too
    files = shared_by(pids)
    done = tandem("down", "--grpc", cluster.grpc)
    assert done.returncode == 0, done.stderr
    assert cluster.process.wait(10) == 0
    eventually(lambda: not alive(pids))
    assert not files & shared_memory()
    assert tandem("status", "--grpc", cluster.grpc).returncode == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "kill -9"])
def test_whatever_ends_it_leaves_no_process_and_no_file(tmp_path: Path, number: signal.Signals) -> None:
    with tandem_up(tmp_path, config=CONFIG) as cluster:
        pids = family(cluster.process.pid)
        files = shared_by(pids)
        assert files, "split pools on one host share memory"
        if number is signal.SIGINT:
            os.killpg(cluster.process.pid, number)
        else:
            os.kill(cluster.process.pid, number)
        status = cluster.process.wait(20)
        eventually(lambda: not alive(pids))
        assert not files & shared_memory()
        assert status == (0 if number is signal.SIGINT else -signal.SIGKILL)
        cluster.process.returncode = 0  # ended as this test wanted; the harness need not look again
