"""What router and SDK cost: the workers compute nothing, so all the time there is is theirs.

Claims
- Router and SDK add at most 3 ms to the first token. Measured against the same scripted workers driven directly over one
  gRPC stream, in turns, request by request.
- 32 concurrent streams get at least 5,000 tokens/s through the router, while the workers, stepping at that rate, do not
  wait for it. Beside it: the most that passes when the workers never pause, and the router's CPU time per token.

Three processes share the machine: the workers, the router (as a cluster runs it), and this one with the SDK.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import grpc

from benchmarks.rows import Row, arguments, report
from cluster.main import with_ports
from core.config import load
from core.hostspec import HostSpec
from core.request import WorkerRole
from core.wire import each_event
from tandem import AsyncClient, SamplingParams
from tandem.v1 import common_pb2 as pb
from tandem.v1.prefill_pb2_grpc import PrefillStub

STREAMS = 32
RELAY_BAR = 5000.0
FIRST_TOKEN_BAR_MS = 3.0
PROMPT = list(range(100, 356))
_TICKS = os.sysconf("SC_CLK_TCK")


class Pool:
    """The workers' process and the routers'."""

    def __init__(self, workers: subprocess.Popen[str], routers: list[subprocess.Popen[str]], addresses: list[str]) -> None:
        self._workers = workers
        self._routers = routers
        self.routers = len(routers)
        self.worker_addresses = addresses
        reached = [_line(workers) for _ in routers]
        self.router_address: str = reached[0]["router"]
        self.http_address: str = reached[0]["http"]

    def counters(self, word: str = "") -> dict[str, float]:
        """`time N`: workers decode once N requests have joined, and note when they write which token."""
        found: dict[str, float] = self._ask(word)
        return found

    def times(self) -> dict[str, list[float]]:
        """Of each request's tokens from the second on, when a worker wrote them."""
        found: dict[str, list[float]] = self._ask("times")
        return found

    def router_cpu_s(self) -> float:
        return sum(map(_cpu_s, self._routers))

    def pin(self, routers: set[int], workers: set[int]) -> None:
        """To these cores, every thread of theirs."""
        for process, cores in (*((r, routers) for r in self._routers), (self._workers, workers)):
            for thread in os.listdir(f"/proc/{process.pid}/task"):
                os.sched_setaffinity(int(thread), cores)

    def _ask(self, word: str) -> Any:
        assert self._workers.stdin is not None
        self._workers.stdin.write(f"{word}\n")
        self._workers.stdin.flush()
        return _line(self._workers)


def _cpu_s(process: subprocess.Popen[str]) -> float:
    with open(f"/proc/{process.pid}/stat", encoding="ascii") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


@contextmanager
def pools(step_s: float, routers: int, *roles: str, policy: str = "least_load") -> Iterator[Pool]:
    """Workers of these roles and so many routers at one address. The policy is one that always hands over, for the requests
    that cross two workers are what a router has most to do with."""
    python = (sys.executable, "-m")
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = subprocess.Popen((*python, "benchmarks.router_pool", str(step_s), *roles), **pipes)
    processes: list[subprocess.Popen[str]] = []
    with ExitStack() as held:
        try:
            first = _line(workers)
            config = load(
                None, {"log_level": "warning", "cluster.grace_s": 1.0, "cluster.routers": routers, "router.policy": policy}
            )
            if routers > 1:
                config = with_ports(config, held)
            for number in range(routers):
                spec = HostSpec(f"router-{number}", WorkerRole.ROUTER, 1, config, first["controller"])
                router = subprocess.Popen((*python, "cluster.host", str(os.getpid())), **pipes)
                processes.append(router)
                assert router.stdin is not None
                router.stdin.write(spec.to_json() + "\n")
                router.stdin.flush()
            yield Pool(workers, processes, first["workers"])
        finally:
            for process in (*processes, workers):
                process.terminate()
                process.communicate(timeout=20)


def pool(step_s: float, *roles: str) -> AbstractContextManager[Pool]:
    return pools(step_s, 1, *roles)


def _line(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit("a process of the benchmark ended early; its messages are above")
    found: dict[str, Any] = json.loads(line)
    return found


# ---- the first token


async def first_token(requests: int) -> list[Row]:
    added: dict[str, list[float]] = {"direct": [], "through": []}
    with pool(0.001, "prefill", "decode") as p:
        async with AsyncClient(p.router_address) as client, grpc.aio.insecure_channel(p.worker_addresses[0]) as channel:
            stub: Any = PrefillStub
            call = stub(channel).Session()
            await call.write(pb.SessionCommand(hello=pb.SessionHello(peer_id="bench", epoch=1, expected_epoch=1)))
            await call.read()
            for index in range(-20, requests):
                direct_s, through_s = await _direct(call, index), await _through(client)
                if index >= 0:
                    added["direct"].append(direct_s)
                    added["through"].append(through_s)
            call.cancel()
    extra = sorted((through - direct) * 1e3 for direct, through in zip(added["direct"], added["through"], strict=True))
    how = f"{requests} requests one at a time, 256 prompt tokens, split pair, in turns with the worker driven directly"
    return [
        Row(
            "router.first_token_added",
            "router and SDK add to the first token, median",
            statistics.median(extra),
            "ms",
            FIRST_TOKEN_BAR_MS,
            "<=",
            "the same worker over one gRPC stream",
            how,
        ),
        Row(
            "router.first_token_added_p90", "the same, 90th percentile", extra[len(extra) * 9 // 10], "ms", None, "<=", how=how
        ),
    ]


async def _direct(call: Any, index: int) -> float:
    item = pb.WorkItem(key=pb.AttemptKey(request_id=f"direct{index}", attempt=1), token_ids=PROMPT, prompt_len=len(PROMPT))
    item.sampling.max_tokens = 1
    item.sampling.seed = 1
    began = time.perf_counter()
    await call.write(pb.SessionCommand(start_prefill=pb.StartPrefill(item=item)))
    took_s, told = 0.0, ""
    while told != "prefill_done":
        for event in each_event(await call.read()):
            told = event.WhichOneof("event")
            took_s = took_s or (time.perf_counter() - began if told == "tokens" else 0.0)
    return took_s


async def _through(client: AsyncClient) -> float:
    began = time.perf_counter()
    took_s = 0.0
    async with client.stream(PROMPT, SamplingParams(max_tokens=2, seed=1, ignore_eos=True)) as stream:
        async for _ in stream:
            took_s = took_s or time.perf_counter() - began
    return took_s


# ---- the relay


async def relay(step_s: float, tokens: int) -> dict[str, float]:
    """32 streams of `tokens` each; what passed, what the router spent, what the workers waited."""
    with pool(step_s, "prefill", "decode") as p:
        async with AsyncClient(p.router_address) as client:
            await asyncio.gather(*(_drain(client, 20) for _ in range(STREAMS)))  # connections and caches are warm
            before, cpu_s, began = p.counters(), p.router_cpu_s(), time.perf_counter()
            got = sum(await asyncio.gather(*(_drain(client, tokens) for _ in range(STREAMS))))
            took_s = time.perf_counter() - began
            after, cpu_s = p.counters(), p.router_cpu_s() - cpu_s
    assert got == STREAMS * tokens, "every token arrives, once"
    busy_s = after["busy_s"] - before["busy_s"]
    return {
        "tokens_per_s": got / took_s,
        "cpu_us": cpu_s / got * 1e6,
        "waited": (after["waited_s"] - before["waited_s"]) / busy_s,
    }


async def _drain(client: AsyncClient, tokens: int) -> int:
    count = 0
    async with client.stream(PROMPT, SamplingParams(max_tokens=tokens, seed=1, ignore_eos=True)) as stream:
        async for _ in stream:
            count += 1
    return count


async def relays(tokens: int) -> list[Row]:
    step_s = STREAMS / (RELAY_BAR * 1.1)
    paced, flat_out = await relay(step_s, tokens), await relay(0.0, tokens)
    how = f"{STREAMS} streams of {tokens} tokens, a message per step, workers, router and client on one machine"
    paced_how = f"{how}; a step every {step_s * 1e3:.1f} ms"
    return [
        Row(
            "router.relay",
            "relayed to 32 streams, workers at that pace",
            paced["tokens_per_s"],
            "tokens/s",
            RELAY_BAR,
            how=paced_how,
        ),
        Row(
            "router.worker_wait",
            "of a worker's time, waiting for the router",
            paced["waited"] * 100,
            "%",
            1.0,
            "<=",
            how=paced_how,
        ),
        Row("router.cpu_per_token", "router CPU per token at that pace", paced["cpu_us"], "us", None, "<=", how=paced_how),
        Row("router.relay_most", "the same with workers that never pause", flat_out["tokens_per_s"], "tokens/s", None, how=how),
    ]


def main() -> None:
    options = arguments(__doc__).parse_args()
    requests, tokens = (200, 400) if options.quick else (1000, 2000)
    rows = [*asyncio.run(first_token(requests)), *asyncio.run(relays(tokens))]
    report(rows, options.json)


if __name__ == "__main__":
    main()
