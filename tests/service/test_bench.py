"""`tandem bench` against servers that stall: nobody who was due meanwhile is forgotten; and reports of several rates."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from scripted_inference import ScriptedInference, serving

from cli.load import Job, run_closed, run_open
from cli.targets import Asked, open_http

pytestmark = pytest.mark.service
TANDEM = str(Path(sys.executable).with_name("tandem"))
STALL_S = 1.0
STALL_AT = 20
"""The request that begins it."""
EVERY_S = 0.02
MODELS = json.dumps({"data": [{"id": "demo"}]}).encode()
REFUSAL = b'{"error": {"message": "no such model", "type": "invalid_request_error"}}'
TOKEN = b'data: {"choices": [{"text": "x"}]}\n\n'


class StallingServer:
    """Answers a completion with `max_tokens` tokens at once, but for STALL_S after request STALL_AT answers nobody."""

    def __init__(self, stalls: bool = True) -> None:
        self.asked = 0
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[bytes] = set()
        self._stalls = stalls
        self.refuses: Callable[[int], bool] = lambda number: False
        self._going = asyncio.Event()
        self._going.set()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        listener = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        async with listener:
            yield f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
        if b"/v1/models" in head:
            kind, body = b"application/json", MODELS
        else:
            asked = json.loads(await reader.readexactly(length))
            self.keys.add(head.partition(b"Authorization: ")[2].split(b"\r\n")[0])
            self.bodies.append(asked)
            self.asked += 1
            if self._stalls and self.asked == STALL_AT:
                self._going.clear()
                asyncio.get_running_loop().call_later(STALL_S, self._going.set)
            await self._going.wait()
            if self.refuses(self.asked):
                writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: %d\r\n\r\n%s" % (len(REFUSAL), REFUSAL))
                await writer.drain()
                writer.close()
                return
            kind, body = b"text/event-stream", TOKEN * asked["max_tokens"] + b"data: [DONE]\n\n"
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n%s" % (kind, len(body), body))
        await writer.drain()
        writer.close()


def jobs(count: int) -> list[Job]:
    return [Job(number * EVERY_S, 5, 3, number) for number in range(count)]


async def test_whoever_was_due_during_a_stall_waited_for_its_end() -> None:
    async with StallingServer().listening() as url, open_http(url, Asked(20.0)) as target:
        traces = await run_open(target, jobs(100), lambda trace: None)
    ttft_s = [trace.ttft_s or 0.0 for trace in traces]
    due_in_stall = round(STALL_S / EVERY_S)
    assert sum(waited > STALL_S / 2 for waited in ttft_s) >= due_in_stall / 2 - 3, (
        "those due in its first half waited the other"
    )
    for late in range(0, 40, 5):  # each by what was left of it when it was due
        assert ttft_s[STALL_AT + late] >= STALL_S - (late + 2) * EVERY_S - 0.05


async def test_a_closed_loop_sees_the_same_stall_once() -> None:
    """Why users are told of the open loop: one waiting client asks nothing meanwhile."""
    async with StallingServer().listening() as url, open_http(url, Asked(20.0)) as target:
        traces = await run_closed(target, iter(jobs(100)), 1, until_s=60.0, on_done=lambda trace: None)
    assert sum((trace.ttft_s or 0.0) > STALL_S / 2 for trace in traces) == 1


async def test_a_client_that_falls_behind_counts_from_when_it_should_have_sent() -> None:
    def fall_behind() -> None:
        end = time.monotonic() + STALL_S
        while time.monotonic() < end:  # this process is busy with something else: nothing can be sent
            pass

    async with StallingServer(stalls=False).listening() as url, open_http(url, Asked(20.0)) as target:
        asyncio.get_running_loop().call_later(STALL_AT * EVERY_S, fall_behind)
        traces = await run_open(target, jobs(100), lambda trace: None)
    assert sum((trace.ttft_s or 0.0) > STALL_S / 2 for trace in traces) >= STALL_S / EVERY_S / 2 - 3


@contextmanager
def on_a_thread(server: StallingServer) -> Iterator[str]:
    loop, up, down = asyncio.new_event_loop(), threading.Event(), asyncio.Event()
    address: list[str] = []

    async def run() -> None:
        async with server.listening() as url:
            address.append(url)
            up.set()
            await down.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(run()))
    thread.start()
    try:
        assert up.wait(20)
        yield address[0]
    finally:
        loop.call_soon_threadsafe(down.set)
        thread.join(20)
        loop.close()


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([TANDEM, "bench", *arguments], capture_output=True, text=True, timeout=90)


TRACE = str(Path(__file__).parents[1] / "sim" / "data" / "mooncake_conversation_300.jsonl.gz")
SHAPE = {
    "requests", "completed", "rejected", "failed", "duration_s", "ttft_s", "tpot_s", "tbt_s", "itl_s", "e2e_s",
    "attainment", "goodput_rps", "goodput_mean_rps", "output_tokens_per_s",
}  # fmt: skip


def test_one_rate_gives_one_report_of_the_agreed_shape(tmp_path: Path) -> None:
    with on_a_thread(StallingServer()) as url:
        done = bench("--url", url, "--rate", "50", "--arrivals", "constant", "--duration", "2", "--ttft-slo", "0.5",
                     "--tbt-slo", "1", "--json", str(tmp_path / "r.json"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "r.json").read_text())
    assert set(report) >= SHAPE
    assert set(report["ttft_s"]) == {"p50", "p90", "p99", "mean"}
    assert set(report["attainment"]) == {"ttft", "tbt", "tpot", "joint", "joint_mean"}
    assert (report["requests"], report["completed"], report["rate_rps"]) == (100, 100, 50.0)
    assert report["ttft_s"]["p90"] > 0.4 * STALL_S, "the stall is in the percentiles"
    assert 0.5 < report["attainment"]["joint"] < 0.85, "and in the attainment"
    assert report["goodput_rps"] == pytest.approx(report["attainment"]["joint"] * 100 / report["duration_s"])


def test_several_rates_give_a_report_each_and_a_picture(tmp_path: Path) -> None:
    server = StallingServer(stalls=False)
    with on_a_thread(server) as url:
        done = bench("--url", url, "--rate", "20,40", "--duration", "1", "--arrivals", "gamma", "--cv", "2",
                     "--ttft-slo", "10", "--input-tokens", "4-9", "--ids", "--declare", "--api-key", "k1",
                     "--json", str(tmp_path / "r.json"),
                     "--plot", str(tmp_path / "r.png"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    tree = json.loads((tmp_path / "r.json").read_text())
    assert [run["rate_rps"] for run in tree["runs"]] == [20.0, 40.0]
    assert all(set(run) >= SHAPE for run in tree["runs"])
    assert tree["rate_rps_at_90"] == 40.0
    assert "…" not in done.stdout, "eighty columns are enough for the table"
    assert (tmp_path / "r.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert server.keys == {b"Bearer k1"}
    assert all(4 <= len(body["prompt"]) <= 9 and body["ttft_slo_s"] == 10 for body in server.bodies)


def test_a_tandem_cluster_is_told_of_the_limits_unless_not_wanted(tmp_path: Path) -> None:
    server = ScriptedInference()
    with serving(server) as address:
        asked = ("--grpc", address, "--requests", "3", "--warmup", "0", "--ttft-slo", "2", "--tbt-slo", "0.5")
        assert bench(*asked, "--slo-class", "batch").returncode == 0
        assert bench(*asked, "--no-declare", "--json", "-").returncode == 0
    told, untold = server.requests[:3], server.requests[3:]
    assert len(untold) == 3
    assert all((r.ttft_slo_s, r.tbt_slo_s, r.slo_class, r.HasField("tpot_slo_s")) == (2, 0.5, "batch", False) for r in told)
    assert not any(r.HasField("ttft_slo_s") or r.slo_class for r in untold)


def test_a_run_in_which_nobody_was_answered_has_failed_and_says_why(tmp_path: Path) -> None:
    server = StallingServer(stalls=False)
    server.refuses = lambda number: True
    path = tmp_path / "r.json"
    with on_a_thread(server) as url:
        done = bench("--url", url, "--rate", "20,40", "--requests", "10", "--warmup", "0", "--json", str(path))  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines() == ["tandem: every request failed, 20 in all; the first one: no such model"]
    assert [run["failed"] for run in json.loads(path.read_text())["runs"]] == [10, 10], "the report is written all the same"


def test_a_run_in_which_some_were_answered_says_how_many_were_not() -> None:
    server = StallingServer(stalls=False)
    server.refuses = lambda number: number % 4 == 0
    with on_a_thread(server) as url:
        done = bench("--url", url, "--rate", "20", "--requests", "20", "--warmup", "0")
    assert (done.returncode, done.stderr) == (0, "")
    assert "of 20 requests 5 failed, 0 were refused" in done.stdout
    assert "5 × no such model" in done.stdout


def test_a_trace_that_asks_for_nothing_measures_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.csv").write_text("arrival_s,input_tokens,output_tokens\n")
    with on_a_thread(StallingServer(stalls=False)) as url:
        done = bench("--url", url, "--trace", str(tmp_path / "empty.csv"))
    assert (done.returncode, done.stderr.count("no request to send")) == (1, 1)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--rate", "1,x"), "--rate must be"),
        (("--rate", "0"), "--rate must be"),
        (("--rate", "5", "--plot", "x.png"), "give several"),
        (("--plot", "x.png"), "give several"),
        (("--rate", "5", "--cv", "2"), "add --arrivals gamma"),
        (("--rate", "5", "--trace", TRACE), "--rate or --trace"),
        (("--input-tokens", "9-1"), "--input-tokens must be"),
        (("--trace", "/nowhere.csv"), "cannot read the trace"),
        (("--json", "/nowhere/report.json"), "cannot write /nowhere/report.json"),
    ],
)
def test_what_cannot_be_measured_is_said(arguments: tuple[str, ...], why: str) -> None:
    with serving(ScriptedInference()) as address:
        done = bench("--grpc", address, "--requests", "1", *arguments)
    assert done.returncode == 2, done.stderr
    assert why in done.stderr
