"""How fast the simulator is.

Claims, as issue 5 states them:
  bare      the event heap alone lets 100,000 events happen a second
  checks    20,000 a second with the product and every rule looked at after every event
  mooncake  Mooncake's conversation trace on 64 workers in under 60 s (needs --data; with --quick the first
            1,500 requests under `least_load`, and the whole at their pace)
  million   a million ServeGen requests on 1,000 workers in under 20 minutes (needs --data; with --quick the first 3,000, and
            a million at their pace is stated, not judged), and how much memory the process had half way and at the end
  stories   200 fault stories (`make sim`) in under five minutes, on all cores
  NAME      another simulator takes ten times as long for the same requests: `--peer NAME=SECONDS=FILE`, where FILE holds
            [[arrival_s, input_tokens, output_tokens], ...] and SECONDS is what the other took. Theirs are not installed here;
            ours plays a prefill and a decode worker per 750 requests of them

An event is one entry popped from the heap. Steps between which nothing changes are taken in one event, so there are fewer and
heavier events than tokens.

    python -m benchmarks.simulator_speed [--quick] [--data DIR] [--only NAME,NAME] [--peer NAME=SECONDS=FILE] [--json FILE]
"""

from __future__ import annotations

import json
import logging
import resource
import time
from collections.abc import Iterator
from itertools import islice
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
from sim.world import World

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
    text = "events a second with the product and every check"
    return Row("simulator.speed.checks", text, rate, "1/s", 20_000, how=_how(result))


def mooncake(data: Path, quick: bool) -> list[Row]:
    rows = []
    for policy in ("least_load",) if quick else ("least_load", "goodput"):
        arrivals = list(read_trace(str(data / "traces" / "mooncake_conversation.jsonl.gz")))
        some = arrivals[:1500] if quick else arrivals
        result = simulate(cluster(32, 32, 400), some, policy, 0, model=LLAMA_70B)
        text = f"Mooncake's conversation trace on 64 workers, {policy}" + (", at the pace of a part" if quick else "")
        took_s, bar = result.wall_s * len(arrivals) / len(some), None if quick else 60
        rows.append(Row(f"simulator.speed.mooncake.{policy}", text, took_s, "s", bar, "<=", how=_how(result)))
    return rows


def million(data: Path, quick: bool) -> Row:
    count = 3_000 if quick else 1_000_000
    seen: list[tuple[int, int]] = []

    def look(world: World) -> None:
        seen.append((world.arrived, resident_mib()))

    arrivals = islice(_again(data), count)
    result = simulate(cluster(300, 700, 40), arrivals, "least_load", 0, model=LLAMA_70B, on_look=look)
    half = next(mib for arrived, mib in seen if arrived >= count // 2)
    minutes = result.wall_s * 1_000_000 / count / 60
    text = "a million ServeGen requests on 1,000 workers" + (f", at the pace of the first {count}" if quick else "")
    return Row(
        "simulator.speed.million",
        text,
        minutes,
        "min",
        None if quick else 20,
        "<=",
        how=f"{_how(result)}; {half} MiB at half time, {seen[-1][1]} at the end",
    )


def resident_mib() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20


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
    count = 20 if quick else 200
    logging.disable(logging.CRITICAL)
    started = time.perf_counter()
    wrong = sum(finding is not None for finding in sweep(0, count))
    took_s = (time.perf_counter() - started) * 200 / count
    logging.disable(logging.NOTSET)
    text = "200 fault stories" + (f", at the pace of {count}" if quick else "")
    return Row("simulator.speed.stories", text, took_s, "s", 300, "<=", how=f"all cores; {wrong} broke a rule")


def peer(name: str, seconds: str, path: str) -> Row:
    """Ours on the requests that another simulator took so many seconds for."""
    arrivals = [Arrival(*each) for each in json.loads(Path(path).read_text())]
    pairs = max(1, len(arrivals) // 750)
    result = simulate(cluster(pairs, pairs, 240), arrivals, "least_load", 0, model=LLAMA_70B)
    text = f"{name}'s time on the same requests over ours"
    how = f"{float(seconds):.1f} s; ours {result.wall_s:.1f} s, {_how(result)}"
    return Row(f"simulator.speed.peer.{name}", text, float(seconds) / result.wall_s, "x", 10, how=how)


def _how(result: SimResult) -> str:
    events, requests = result.report["events"], result.report["requests"]
    pace = f"{events / result.wall_s:.0f} events/s, {requests / result.wall_s:.0f} requests/s"
    return f"{requests} requests, {events} events, {pace}, one core"


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--only", default="bare,checks,mooncake,million,stories", help="which claims, by the names above")
    parser.add_argument(
        "--peer", action="append", default=[], help="NAME=SECONDS=FILE: another simulator's time on those requests"
    )
    args = parser.parse_args()
    only, rows = args.only.split(","), []
    rows += [bare()] if "bare" in only else []
    rows += [checked()] if "checks" in only else []
    if args.data is not None:
        rows += mooncake(args.data, args.quick) if "mooncake" in only else []
        rows += [million(args.data, args.quick)] if "million" in only else []
    rows += [stories(args.quick)] if "stories" in only else []
    rows += [peer(*each.split("=", 2)) for each in args.peer]
    report(rows, args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
