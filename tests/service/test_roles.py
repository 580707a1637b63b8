"""Workers change their roles under load: tokens stay exact, nothing is placed again, no process is replaced."""

from __future__ import annotations

import asyncio
import subprocess

import pytest
from cluster_up import TANDEM, Cluster, eventually, tandem_up

from tandem import AsyncClient, SamplingParams

pytestmark = [pytest.mark.service, pytest.mark.timeout(180)]

CONFIG = "engine: {kv_bytes: 8MiB, max_step_tokens: 32}\ncluster: {heartbeat_s: 0.2}\n"
PROMPTS = [f"# request {i}\nimport asyncio\n" + "def serve(self, reader):\n" * (1 + 3 * (i % 4)) for i in range(8)]
PARAMS = [SamplingParams(max_tokens=48, temperature=0.8 * (i % 2), seed=i, ignore_eos=True) for i in range(8)]
CHANGES = (("prefill-1", "decode"), ("decode-0", "prefill"), ("decode-1", "colocated"), ("decode-0", "decode"))


async def answers(client: AsyncClient) -> tuple[list[tuple[int, ...]], int, set[str]]:
    """Tokens, failovers in all, and who decoded."""
    results = await asyncio.gather(*(client.generate(*request) for request in zip(PROMPTS, PARAMS, strict=True)))
    tokens = [tuple(r.choices[0].token_ids) for r in results]
    return tokens, sum(r.failovers for r in results), {r.placement.decode for r in results}


def role(cluster: Cluster, target: str, plays: str) -> subprocess.CompletedProcess[str]:
    command = [TANDEM, "role", target, plays, "--admin", cluster.admin]
    return subprocess.run(command, capture_output=True, text=True, timeout=30)


def roles(cluster: Cluster) -> dict[str, str]:
    workers = cluster.status()["workers"]
    return {w["id"]: w["role"] for w in workers if w["role"] in ("prefill", "decode", "colocated")}


def lives(cluster: Cluster) -> dict[str, tuple[int, int]]:
    return {w["id"]: (w["pid"], w["epoch"]) for w in cluster.status()["workers"]}


def told(cluster: Cluster, target: str, plays: str) -> None:
    done = role(cluster, target, plays)
    assert done.returncode == 0, done.stderr
    assert "keeps what it holds" in done.stdout
    eventually(lambda: roles(cluster)[target] == plays)


class Load:
    """Round after round of the same requests, until it is told to end."""

    def __init__(self, client: AsyncClient, expected: list[tuple[int, ...]]) -> None:
        self.rounds = 0
        self.failovers = 0
        self._client = client
        self._expected = expected
        self._ended = asyncio.Event()
        self.task = asyncio.create_task(self._run())

    async def two_more_rounds(self) -> None:
        until = self.rounds + 2
        async with asyncio.timeout(60):
            while self.rounds < until and not self.task.done():  # noqa: ASYNC110
                await asyncio.sleep(0.05)

    async def end(self) -> None:
        self._ended.set()
        await self.task

    async def _run(self) -> None:
        while not self._ended.is_set():
            tokens, lost, _ = await answers(self._client)
            assert tokens == self._expected
            self.rounds, self.failovers = self.rounds + 1, self.failovers + lost


async def test_roles_change_under_load(tmp_path):
    with tandem_up(tmp_path, "--prefill", "2", "--decode", "2", config=CONFIG) as cluster:
        before = lives(cluster)
        async with AsyncClient(cluster.grpc) as client:
            expected, _, _ = await answers(client)
            load = Load(client, expected)
            for change in CHANGES:
                await asyncio.to_thread(told, cluster, *change)
                await load.two_more_rounds()
            await load.end()
            assert load.failovers == 0, "something was dropped and placed again"
            tokens, _, decoders = await answers(client)
            assert tokens == expected
            assert "prefill-0" not in decoders
        assert roles(cluster) == {"prefill-0": "prefill", "prefill-1": "decode", "decode-0": "decode", "decode-1": "colocated"}
        assert lives(cluster) == before
        refused = role(cluster, "prefill-0", "decode")
        assert refused.returncode != 0
        assert "at least one prefill" in refused.stderr
        assert "Traceback" not in cluster.log.read_text()


def test_a_role_that_is_none_is_refused_by_name():
    done = role(Cluster(None, "", "", "127.0.0.1:1", None), "prefill-0", "chef")
    assert done.returncode != 0
    assert "chef is no role" in done.stderr
