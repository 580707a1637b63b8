"""The default: a local Ray, workers as its actors. One cluster for the whole file, because Ray takes seconds to start."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_up import Cluster, eventually, tandem_up
from process_family import LOOPBACK, alive, family, listening, shared_by, shared_memory

from tandem import Client, SamplingParams

pytestmark = [pytest.mark.ray_cluster, pytest.mark.service, pytest.mark.timeout(240)]

CONFIG = "engine: {kv_bytes: 8MiB}\ncluster: {heartbeat_s: 0.2, grace_s: 5}\n"
PROMPT = "def merge(left, right):\n"
SAMPLING = SamplingParams(max_tokens=1200, temperature=0.8, seed=11, ignore_eos=True)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with tandem_up(tmp_path_factory.mktemp("ray"), "--launcher", "ray", config=CONFIG) as running:
        yield running


@pytest.fixture(scope="module")
def expected(cluster: Cluster) -> tuple[int, ...]:
    """The tokens of the undisturbed run."""
    with Client(cluster.grpc) as client:
        result = client.generate(PROMPT, SAMPLING)
    assert (result.placement.prefill, result.placement.decode) == ("prefill-0", "decode-0")
    return result.token_ids


def test_workers_are_actors_of_a_ray_that_listens_to_this_machine_alone(cluster: Cluster, expected: tuple[int, ...]) -> None:
    processes = family(cluster.process.pid)
    names = {Path(f"/proc/{pid}/cmdline").read_text().partition("\0")[0] for pid in processes}
    assert any("raylet" in name for name in names)
    assert {worker["pid"] for worker in cluster.status()["workers"]} < processes
    addresses = listening(processes)
    assert addresses
    assert addresses <= LOOPBACK


@pytest.mark.parametrize("role", ["decode", "prefill"])
def test_an_actor_killed_in_mid_stream_is_replaced_and_the_stream_goes_on(
    cluster: Cluster, expected: tuple[int, ...], role: str
) -> None:
    victim = cluster.workers(role)[0]
    with Client(cluster.grpc) as client, client.stream(PROMPT, SAMPLING) as stream:
        first = [next(stream).token_id for _ in range(3)]
        os.kill(victim["pid"], signal.SIGKILL)
        rest = [token.token_id for token in stream]
        assert tuple(first + rest) == expected
        if role == "decode":
            assert stream.result.failovers >= 1
    (successor,) = eventually(lambda: [w for w in cluster.workers(role) if w["epoch"] == victim["epoch"] + 1], 90)
    assert successor["id"] == victim["id"]
    assert successor["pid"] != victim["pid"]
    with Client(cluster.grpc) as client:
        assert client.generate(PROMPT, SAMPLING).token_ids == expected


def test_a_killed_router_comes_back_where_it_was(cluster: Cluster, expected: tuple[int, ...]) -> None:
    (router,) = cluster.workers("router")
    os.kill(router["pid"], signal.SIGKILL)

    def back() -> bool:
        return any(w["epoch"] == 2 and w["grpc"] == cluster.grpc for w in cluster.workers("router"))

    eventually(back, 60)
    with Client(cluster.grpc) as client:
        assert client.generate(PROMPT, SAMPLING).token_ids == expected


def test_a_signal_to_the_whole_process_group_leaves_nothing(cluster: Cluster) -> None:
    """What a supervisor or a terminal does. Last of this cluster."""
    processes = family(cluster.process.pid)
    workers = {worker["pid"] for worker in cluster.status()["workers"]}
    files = shared_by(workers)
    session = {path for pid in processes for path in _sessions(pid)}
    assert files
    assert session
    os.killpg(cluster.process.pid, signal.SIGTERM)
    assert cluster.process.wait(40) == 0, cluster.log.read_text()[-4000:]
    eventually(lambda: not alive(processes), 30)
    assert not files & shared_memory()
    assert not [path for path in session if path.exists()]
    assert "Traceback" not in cluster.log.read_text()


def _sessions(pid: int) -> set[Path]:
    """Ray session directories named on a command line."""
    words = Path(f"/proc/{pid}/cmdline").read_text().replace("=", "\0").split("\0")
    return {Path(word.partition("/session_")[0]) for word in words if "/session_" in word and word.startswith("/")}
