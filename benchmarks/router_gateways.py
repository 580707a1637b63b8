"""Placement alone: our router beside SGLang's gateway, Dynamo's frontend with its KV router, and a bare least-load proxy.

Claims (stated, not judged: the others do less of some things and more of others)
- Requests per second with 16 clients, and what each adds to one request at a time, over the same request asked of a stand-in
  server directly. One token per answer, so nearly all the time there is is the gateway's.
- The first token of a streamed burst of 200 does not wait for a delayed acknowledgement (40 ms on Linux).

Everybody has four workers that compute nothing, each in its gateway's own tongue: HTTP servers in one process (SGLang's
gateway, the proxy), sessions of ours with one prefill and four decode workers (ours), Dynamo's mocker sped up a million times.
Ours and Dynamo's tokenize the prompt and detokenize the answer; SGLang's gateway and the proxy pass bytes on. All take turns,
each round somebody else first; the client shares the two cores with whoever has its turn.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import httptools
import uvloop

from benchmarks.peers import environment_of, python_of
from benchmarks.router import pools
from benchmarks.rows import Row, arguments, report
from core.config import DEMO_MODEL

WORKERS = 4
CLIENTS = 16
BURST = 200
READY_S = 60.0
PROMPT = "def answer(self, question):\n"


class Asker(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport
        self._parser = httptools.HttpResponseParser(self)
        self._done: asyncio.Future[None]
        self._first_at = 0.0
        self._body = b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    async def ask(self, model: str, tokens: int, *, stream: bool = False) -> tuple[float, float]:
        """Seconds to the first byte of an answer's body, and to its end."""
        body = {"model": model, "prompt": PROMPT, "max_tokens": tokens, "stream": stream, "ignore_eos": True}
        raw = json.dumps(body).encode()
        self._first_at, self._body = 0.0, b""
        self._parser = httptools.HttpResponseParser(self)
        self._done = asyncio.get_running_loop().create_future()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
        )
        began = time.perf_counter()
        self._transport.write(head.encode() + raw)
        async with asyncio.timeout(30):
            await self._done
        return self._first_at - began, time.perf_counter() - began

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._done.done():
            self._done.set_exception(ConnectionError("the gateway hung up"))

    def on_body(self, body: bytes) -> None:
        self._first_at = self._first_at or time.perf_counter()
        self._body += body

    def on_message_complete(self) -> None:
        if self._done.done():
            return
        if self._parser.get_status_code() == 200 and b'"error"' not in self._body:
            self._done.set_result(None)
        else:
            self._done.set_exception(RuntimeError(self._body[:300].decode(errors="replace")))

    def close(self) -> None:
        self._transport.close()


class Gateway(NamedTuple):
    name: str
    address: str
    model: str


class Turn(NamedTuple):
    alone_ms: float
    per_s: float
    first_ms: float


async def turn(gateway: Gateway, requests: int) -> Turn:
    """One at a time, then 16 at a time, then bursts."""
    host, _, port = gateway.address.rpartition(":")
    loop = asyncio.get_running_loop()
    askers = [(await loop.create_connection(Asker, host, int(port)))[1] for _ in range(CLIENTS)]
    one = askers[0]
    for _ in range(20):
        await one.ask(gateway.model, 1)
    alone = [(await one.ask(gateway.model, 1))[1] for _ in range(requests)]
    left = iter(range(8 * requests))

    async def client(asker: Asker) -> None:
        for _ in left:
            await asker.ask(gateway.model, 1)

    began = time.perf_counter()
    await asyncio.gather(*map(client, askers))
    took_s = time.perf_counter() - began
    first = [(await one.ask(gateway.model, BURST, stream=True))[0] for _ in range(max(requests // 10, 10))]
    for asker in askers:
        asker.close()
    return Turn(1e3 * statistics.median(alone), 8 * requests / took_s, 1e3 * statistics.median(first))


# ---- who takes part


@contextmanager
def process(*command: object, env: dict[str, str] | None = None, quiet: bool = False) -> Iterator[subprocess.Popen[str]]:
    """In a group of its own, which ends with the block."""
    errors = subprocess.DEVNULL if quiet else None
    made = subprocess.Popen(
        [str(word) for word in command], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL if quiet else subprocess.PIPE,
        stderr=errors, text=True, env=env, start_new_session=True,
    )  # fmt: skip
    try:
        yield made
    finally:
        os.killpg(made.pid, signal.SIGTERM)
        try:
            made.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(made.pid, signal.SIGKILL)
            made.communicate()


def listening(stack: ExitStack, *words: object) -> str:
    """The address that a module of ours prints."""
    made = stack.enter_context(process(sys.executable, "-m", *words))
    assert made.stdout is not None
    return made.stdout.readline().strip()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def sglang(stack: ExitStack, servers: list[str]) -> Gateway | None:
    python = python_of("sglang-router")
    if python is None:
        return None
    port = free_port()
    urls = [f"http://{server}" for server in servers]
    command = (python, "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", port, "--policy", "cache_aware")
    log = ("--log-level", "error", "--prometheus-port", free_port())
    stack.enter_context(process(*command, *log, "--worker-urls", *urls, env=environment_of("sglang-router"), quiet=True))
    return Gateway("SGLang's gateway", f"127.0.0.1:{port}", DEMO_MODEL)


def dynamo(stack: ExitStack) -> Gateway | None:
    python = python_of("dynamo")
    if python is None:
        return None
    port, folder = free_port(), tempfile.mkdtemp(prefix="tandem-bench-")
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    env = environment_of("dynamo", DYN_LOG="error", DYN_FILE_KV=f"{folder}/kv", HF_HUB_OFFLINE="1")
    planes = ("--discovery-backend", "file", "--request-plane", "tcp", "--event-plane", "zmq")
    mocker = ("-m", "dynamo.mocker", "--model-path", DEMO_MODEL, "--model-name", "demo", "--num-workers", WORKERS)
    stack.enter_context(process(python, *mocker, "--speedup-ratio", 1_000_000, *planes, env=env, quiet=True))
    front = ("-m", "dynamo.frontend", "--router-mode", "kv", "--http-host", "127.0.0.1", "--http-port", port)
    stack.enter_context(process(python, *front, *planes, env=env, quiet=True))
    return Gateway("Dynamo's frontend", f"127.0.0.1:{port}", "demo")


async def answers(gateway: Gateway) -> bool:
    """Whether it serves within a minute."""
    host, _, port = gateway.address.rpartition(":")
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        try:
            _, asker = await asyncio.get_running_loop().create_connection(Asker, host, int(port))
            await asker.ask(gateway.model, 1)
            asker.close()
            return True
        except (OSError, RuntimeError, TimeoutError):
            await asyncio.sleep(0.5)
    print(f"{gateway.name}: not measured (it does not answer)", file=sys.stderr)
    return False


@contextmanager
def contenders() -> Iterator[list[Gateway]]:
    with ExitStack() as stack:
        servers = [listening(stack, "benchmarks.stand_in_server", DEMO_MODEL) for _ in range(WORKERS)]
        proxy = listening(stack, "benchmarks.least_load_proxy", *servers)
        pool = stack.enter_context(pools(0.0, 1, "prefill", *("decode",) * WORKERS))
        made: list[Gateway | None] = [
            Gateway("a stand-in, asked directly", servers[0], DEMO_MODEL),
            Gateway("ours", pool.http_address, "nothing"),
            Gateway("a least-load proxy", proxy, DEMO_MODEL),
            sglang(stack, servers),
            dynamo(stack),
        ]
        yield [gateway for gateway in made if gateway is not None and uvloop.run(answers(gateway))]


def measured(gateways: list[Gateway], rounds: int, requests: int) -> dict[str, Turn]:
    """Medians of the rounds."""
    turns: dict[str, list[Turn]] = {gateway.name: [] for gateway in gateways}
    for number in range(rounds):
        for gateway in (*gateways[number % len(gateways) :], *gateways[: number % len(gateways)]):
            turns[gateway.name].append(uvloop.run(turn(gateway, requests)))
    return {name: Turn(*map(statistics.median, zip(*seen, strict=True))) for name, seen in turns.items()}


def rows(seen: dict[str, Turn], rounds: int, requests: int) -> Iterator[Row]:
    direct = seen["a stand-in, asked directly"]
    how = f"{rounds} rounds of {requests} requests one at a time, {8 * requests} by {CLIENTS} clients; {os.cpu_count()} cores"
    for name in ("a stand-in, asked directly", "ours", "a least-load proxy", "SGLang's gateway", "Dynamo's frontend"):
        found, key = seen.get(name), name.replace(" ", "_").replace(",", "").replace("'", "")
        per_s, added, first = (found.per_s, found.alone_ms - direct.alone_ms, found.first_ms) if found else (None, None, None)
        yield Row(f"gateways.{key}.per_s", f"{name}: requests/s, {CLIENTS} clients", per_s, "1/s", how=how)
        yield Row(f"gateways.{key}.added", f"{name}: added to a request, median", added, "ms", None, "<=", how=how)
        bar = 40.0 if name == "ours" else None
        claim = f"{name}: first token of a burst of {BURST}, median"
        yield Row(f"gateways.{key}.burst", claim, first, "ms", bar, "<=", how=f"{how}; server-sent events")


def main() -> None:
    options = arguments(__doc__).parse_args()
    rounds, requests = (3, 100) if options.quick else (5, 400)
    assert Path(DEMO_MODEL).exists()
    with contenders() as gateways:
        seen = measured(gateways, rounds, requests)
    report(rows(seen, rounds, requests), options.json)


if __name__ == "__main__":
    main()
