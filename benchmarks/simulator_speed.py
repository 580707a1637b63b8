"""How fast the simulator is.

Claims, as issue 5 states them:
  bare      the event heap alone lets 100,000 events happen a second
  checks    20,000 a second with the product and every rule looked at after every event
  mooncake  Mooncake's conversation trace on 64 workers in under 60 s (needs --data; with --quick its first 200 s, stated)
  million   a million ServeGen requests on 1,000 workers in under 20 minutes (needs --data; with --quick the first thousand,
            and a million at their pace is stated, not judged)
  stories   200 fault stories (`make sim`) in under five minutes, on all cores

An event is one entry popped from the heap. Steps between which nothing changes are taken in one event, so there are fewer and
heavier events than tokens.

    python -m benchmarks.simulator_speed [--quick] [--data DIR] [--json FILE]
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

from benchmarks.rows import Row, arguments, report
from core.config import Config
from core.cost_model import CostModel, StepCost
from sim.events import Events
from sim.run import SimResult, simulate
from sim.sweep import sweep
from sim.traces import read_trace
from sim.workload import Arrival

LLAMA_70B = CostModel(StepCost(0.025, 9e-5, 1.2e-9, 1.2e-4, 1.4e-8), kv_token_bytes=327_680)
"""About Llama 2 70B on eight H100: what is timed here is the simulator, whatever the model."""
BARE_EVENTS = 1_000_000


def cluster(prefill: int, decode: int, kv_gib: int) -> Config:
    tree: dict[str, Any] = {
        "engine": {"block_size": 16, "kv_bytes": kv_gib * 2**30, "max_running": 256, "max_step_tokens": 4096},
        "sim": {
            "pools": [{"role": "prefill", "count": prefill, "tp": 8}, {"role": "decode", "count": decode, "tp": 8}],
            "slo": {"ttft_s": 5.0, "tbt_s": 0.1},
        },
    }
    return Config.model_validate(tree)


def bare() -> Row:
    events = Events()

    def happen() -> None:
        if events.count < BARE_EVENTS:
            events.later(0.1, happen)

    for _ in range(1000):
        events.later(0.1, happen)
    started = time.perf_counter()
    events.run()
    rate = events.count / (time.perf_counter() - started)
    return Row("simulator.speed.bare", "events a second, the heap alone", rate, "1/s", 100_000, how="one core")


def checked() -> Row:
    """Small inventories: every rule is looked at over all blocks of whoever changed."""
    arrivals = [Arrival(0.1 * n, 200 + n % 100, 60) for n in range(600)]
    result = simulate(cluster(4, 4, 1), arrivals, "least_load", 0, model=LLAMA_70B, checks=True)
    rate = float(result.report["events"]) / result.wall_s
    return Row("simulator.speed.checks", "events a second with the product and every check", rate, "1/s", 20_000)


def mooncake(data: Path, quick: bool) -> list[Row]:
    trace = read_trace(str(data / "traces" / "mooncake_conversation.jsonl.gz"))
    arrivals = takewhile(lambda each: each.arrival_s < 200, trace) if quick else trace
    rows = []
    for policy in ("least_load", "goodput") if not quick else ("least_load",):
        result = simulate(cluster(32, 32, 400), arrivals, policy, 0, model=LLAMA_70B)
        text = f"Mooncake's conversation trace{', its first 200 s,' if quick else ''} on 64 workers, {policy}"
        name = f"simulator.speed.mooncake.{policy}"
        rows.append(Row(name, text, result.wall_s, "s", None if quick else 60, "<=", how=_how(result)))
        arrivals = read_trace(str(data / "traces" / "mooncake_conversation.jsonl.gz"))
    return rows


def million(data: Path, quick: bool) -> Row:
    count = 1000 if quick else 1_000_000
    result = simulate(cluster(300, 700, 40), islice(_again(data), count), "least_load", 0, model=LLAMA_70B)
    minutes = result.wall_s * 1_000_000 / count / 60
    text = "a million ServeGen requests on 1,000 workers" + (f", at the pace of the first {count}" if quick else "")
    return Row("simulator.speed.million", text, minutes, "min", None if quick else 20, "<=", how=_how(result))


def _again(data: Path) -> Iterator[Arrival]:
    """The sample, begun again when it is over: it has half a million requests."""
    start_s = 0.0
    while True:
        last_s = 0.0
        for each in read_trace(str(data / "traces" / "servegen" / "m-large_sampled_20min.csv.gz")):
            last_s = each.arrival_s
            yield Arrival(start_s + last_s, each.input_tokens, each.output_tokens, tenant=each.tenant)
        start_s += last_s


def stories(quick: bool) -> Row:
    count = 40 if quick else 200
    logging.disable(logging.CRITICAL)
    started = time.perf_counter()
    wrong = sum(finding is not None for finding in sweep(0, count))
    took_s = (time.perf_counter() - started) * 200 / count
    logging.disable(logging.NOTSET)
    text = "200 fault stories" + (f", at the pace of {count}" if quick else "")
    return Row("simulator.speed.stories", text, took_s, "s", 300, "<=", how=f"all cores; {wrong} broke a rule")


def _how(result: SimResult) -> str:
    events, requests = result.report["events"], result.report["requests"]
    return f"{requests} requests, {events} events, {events / result.wall_s:.0f} events/s, one core"


def main() -> int:
    args = arguments(__doc__).parse_args()
    rows = [bare(), checked()]
    if args.data is not None:
        rows += [*mooncake(args.data, args.quick), million(args.data, args.quick)]
    rows.append(stories(args.quick))
    for peer in ("splitwise-sim", "DistServe's simulator"):
        rows.append(Row(f"simulator.speed.{peer.split('-')[0].split(chr(39))[0].lower()}", f"{peer} on the same input, ratio",
                        None, "x", 10, how="not installed"))  # fmt: skip
    report(rows, args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
