"""How far off the router's predictions are: a real split cluster under open-loop load, asked afterwards about every request.

Claims (issue "The router"): relative error of the predicted TTFT and TPOT against what came, median at most 15 %, 90th
percentile at most 40 %. Both count from the decision that placed the request. Requests arrive as a Poisson process; prompts and
answers have long-tailed lengths, as conversations do; nothing is shared, so that every prompt is computed. The rate is a given
part of what the cluster bears: the requests a second that it completes, at the start of the run, for as many clients as keep it
busy, each asking for the next as soon as it has the last. (What prefill alone would bear says little here: on one machine the
pools share its cores.) The first seconds of load are not counted: workers and router learn from them.

    python -m benchmarks.prediction [--quick] [--json FILE] [--load SHARE] [--policy NAME] [--dump FILE]
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.closed_loop import FIRST_TOKEN_ID, LAST_TOKEN_ID
from benchmarks.clusters import tandem
from benchmarks.rows import Row, arguments, report
from core.latency import percentile
from sim.workload_shapes import Arrivals, arrivals
from tandem import AsyncClient, Explanation, Result, SamplingParams, TandemError

SPLIT = ("--prefill", "1", "--decode", "1", "--launcher", "local")
CONFIG = "engine: {{threads: 1}}\nrouter: {{policy: {policy}}}\n"
WARM_S = 15.0
PROBES, PROBING = 96, 8
"""Requests of the probe, and clients that ask at once."""
PROMPT_TOKENS, PROMPT_SPREAD, PROMPT_MAX = 220.0, 0.8, 900
ANSWER_TOKENS, ANSWER_SPREAD, ANSWER_MAX = 60.0, 0.6, 240
BARS = {"p50": 0.15, "p90": 0.40}


@dataclass(frozen=True, slots=True)
class Asked:
    request_id: str
    due_s: float
    prompt: list[int]
    max_tokens: int


def load(rate: float, seconds: float, seed: int) -> list[Asked]:
    """Log-normal lengths, Poisson arrivals."""
    rng = random.Random(seed)
    made = []
    for number, due_s in enumerate(arrivals(rate, Arrivals.POISSON, 1.0, rng)):
        if due_s >= seconds:
            break
        prompt_tokens = min(PROMPT_MAX, max(16, round(PROMPT_TOKENS * rng.lognormvariate(0, PROMPT_SPREAD))))
        max_tokens = min(ANSWER_MAX, max(4, round(ANSWER_TOKENS * rng.lognormvariate(0, ANSWER_SPREAD))))
        prompt = [rng.randint(FIRST_TOKEN_ID, LAST_TOKEN_ID) for _ in range(prompt_tokens)]
        made.append(Asked(f"r{seed}-{number}", due_s, prompt, max_tokens))
    return made


async def ask(client: AsyncClient, request: Asked) -> Result:
    params = SamplingParams(max_tokens=request.max_tokens, temperature=0.0, ignore_eos=True)
    return await client.generate(request.prompt, params, request_id=request.request_id)


async def borne(address: str) -> float:
    """Requests per second that the cluster completes when `PROBING` clients never pause. The first quarter is not counted."""
    probes, ended_at = iter(load(2.0, 2.0 * PROBES, seed=0)[:PROBES]), list[float]()

    async def keep_asking(client: AsyncClient) -> None:
        for request in probes:
            await ask(client, request)
            ended_at.append(time.monotonic())

    async with AsyncClient(address) as client, asyncio.TaskGroup() as group:
        for _ in range(PROBING):
            group.create_task(keep_asking(client))
    counted = ended_at[len(ended_at) // 4 :]
    return (len(counted) - 1) / (counted[-1] - counted[0])


async def drive(address: str, asked: list[Asked]) -> list[Explanation]:
    """Sends each request when it is due; returns what the router says of those due after the warm-up.

    Raises what a request fails with: at these rates none has to."""
    async with AsyncClient(address) as client:
        start = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for request in asked:
                await asyncio.sleep(max(0.0, start + request.due_s - time.monotonic()))
                group.create_task(ask(client, request))
        return [await client.explain(request.request_id) for request in asked if request.due_s >= WARM_S]


def errors(known: list[Explanation]) -> dict[str, list[float]]:
    """Signed: (predicted − actual) / actual, of requests that stayed where they were placed."""
    found: dict[str, list[float]] = {"ttft": [], "tpot": []}
    for one in known:
        outcome, last = one.outcome, one.decisions[-1]
        if outcome is None or outcome.failovers or not last.candidates:
            continue
        chosen = last.candidates[0]
        found["ttft"].append(chosen.ttft_s / (outcome.timing.ttft_s - last.at_s) - 1)
        if outcome.timing.tpot_s > 0:
            found["tpot"].append(chosen.tpot_s / outcome.timing.tpot_s - 1)
    return found


def rows(known: list[Explanation], how: str) -> list[Row]:
    made = []
    for name, signed in errors(known).items():
        off = sorted(map(abs, signed))
        for share, percent in (("p50", 50), ("p90", 90)):
            claim = f"{name.upper()}: |predicted − actual| / actual, {share}"
            made.append(Row(f"{name}.{share}", claim, percentile(off, percent), "", BARS[share], "<=", "what came", how))
        bias = percentile(sorted(signed), 50)
        claim = f"{name.upper()}: median of (predicted − actual) / actual"
        made.append(Row(f"{name}.bias", claim, bias, "", None, "<=", "", how))
    return made


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--load", type=float, default=0.5, help="part of the requests per second that the cluster bears")
    parser.add_argument("--policy", default="goodput", help="of the router; any of them predicts where it places")
    parser.add_argument("--dump", type=Path, help="write every explanation to this file")
    options = parser.parse_args()
    seconds = WARM_S + (30.0 if options.quick else 120.0)
    with tandem(*SPLIT, config=CONFIG.format(policy=options.policy)) as cluster:
        try:
            rate = options.load * asyncio.run(borne(cluster.grpc))
            asked = load(rate, seconds, seed=1)
            known = asyncio.run(drive(cluster.grpc, asked))
        except* TandemError as failed:
            raise failed.exceptions[0] from None
    how = f"{len(known)} requests, Poisson at {rate:.2f}/s ({options.load:.0%} of what it bears)"
    how += f", 1 prefill and 1 decode worker of 1 thread, {options.policy}"
    if options.dump:
        due_s = {request.request_id: request.due_s for request in asked}
        options.dump.write_text(json.dumps([asdict(one) | {"due_s": due_s[one.request_id]} for one in known]))
    report(rows(known, how), options.json)
    sys.exit(0)


if __name__ == "__main__":
    main()
