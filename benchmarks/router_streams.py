"""500 concurrent streams through the router: tokens per second and core, and what it adds to the gaps between tokens.

Claims
- One router process on a core of its own relays at least 10,000 tokens/s to 500 streams, over gRPC and as server-sent events.
- While it relays 10,000 tokens/s it adds at most 5 ms to a gap between two tokens, 99th percentile: the gap as the client
  sees it less the same gap as the worker wrote it.
- Two routers behind one address relay at least 1.8 times what one does. On two cores they share them with everybody else
  here, so beside it is stated what a second core of its own would give: tokens per CPU second of two against one.

Workers compute nothing (`router_pool`, eight decode workers in one process) and the client is bare sockets: it reads frames
and notes the time. With one router, everybody but the router shares the other core.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import statistics
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import uvloop

from benchmarks.bare_streams import Door, GrpcDoor, SseDoor
from benchmarks.router import Pool, pools
from benchmarks.rows import Row, arguments, report

STREAMS = 500
DECODERS = 8
PACE, MORE = 10_500.0, 40_000.0
RELAY_BAR, ITL_BAR_MS, SCALE_BAR = 10_000.0, 5.0, 1.8
CONNECTIONS = 16
ROLES = ("prefill", *("decode",) * DECODERS)


@dataclass(frozen=True, slots=True)
class Run:
    tokens_per_s: float
    cpu_us: float
    added_ms: list[float]
    """Per gap, sorted: what it was longer at the client than at the worker; negative where it was shorter."""


@asynccontextmanager
async def doors(kind: type[Door], p: Pool) -> AsyncIterator[list[Door]]:
    """Connections, as many to each router as to the others: which one a connection reaches is the kernel's choice."""
    address = p.router_address if kind is GrpcDoor else p.http_address
    found: dict[str, list[Door]] = {}
    wanted = CONNECTIONS // p.routers
    for _ in range(100 * p.routers):
        door = await kind.open(address)
        mine = found.setdefault(await door.whose(), [])
        if len(mine) < wanted:
            mine.append(door)
        else:
            door.close()
        if len(found) == p.routers and all(len(each) == wanted for each in found.values()):
            break
    made = [door for mine in found.values() for door in mine]
    assert len(made) == CONNECTIONS, "connections spread over the routers"
    try:
        yield made
    finally:
        for door in made:
            door.close()


async def relayed(p: Pool, kind: type[Door], tokens: int) -> Run:
    """500 streams of `tokens` tokens; of the time in which all of them run: the first tokens of so many are another matter."""
    async with doors(kind, p) as made:
        await asyncio.gather(*(made[n % CONNECTIONS].stream(f"warm{n}", 10, []) for n in range(STREAMS)))
        p.counters(f"time {STREAMS}")
        seen: list[list[float]] = [[] for _ in range(STREAMS)]
        streams = asyncio.gather(*(made[n % CONNECTIONS].stream(f"s{n}", tokens, seen[n]) for n in range(STREAMS)))
        try:
            await _until(lambda: streams.done() or all(len(arrivals) > 2 for arrivals in seen))
            cpu_s, began, before = p.router_cpu_s(), time.perf_counter(), sum(map(len, seen))
            await _until(lambda: streams.done() or any(len(arrivals) == tokens for arrivals in seen))
            cpu_s, ended, total = p.router_cpu_s() - cpu_s, time.perf_counter(), sum(map(len, seen)) - before
        finally:
            await streams
        written = p.times()
    added = []
    for number, arrivals in enumerate(seen):
        assert len(arrivals) == tokens, "every token arrives, once"
        pairs = zip(arrivals[1:], written[f"s{number}"], strict=True)
        late = [at - gone for at, gone in pairs if began < at < ended]
        added += [1e3 * (after - before) for before, after in itertools.pairwise(late)]
    assert total > STREAMS * tokens // 4, "most of the time all streams run; give them more tokens"
    return Run(total / (ended - began), 1e6 * cpu_s / total, sorted(added))


async def _until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(120):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def run(kind: type[Door], routers: int, step_s: float, tokens: int, *, alone: bool) -> Run:
    """`alone`: the router has the first core for itself, everybody else the second."""
    with pools(step_s, routers, *ROLES) as p:
        if alone:
            p.pin({0}, {1})
            os.sched_setaffinity(0, {1})
        try:
            return await relayed(p, kind, tokens)
        finally:
            os.sched_setaffinity(0, range(os.cpu_count() or 1))


def rows_of(kind: type[Door], tokens: int, rounds: int) -> list[Row]:
    name, how = kind.name, f"{STREAMS} streams of {tokens} tokens, {DECODERS} stand-in decode workers, bare {kind.name} client"
    step_s, fast_s = STREAMS / PACE, STREAMS / MORE
    most, paced, two, one = [], [], [], []
    for _ in range(rounds):
        most.append(uvloop.run(run(kind, 1, fast_s, tokens, alone=True)))
        paced.append(uvloop.run(run(kind, 1, step_s, tokens, alone=True)))
        one.append(uvloop.run(run(kind, 1, fast_s, tokens, alone=False)))
        two.append(uvloop.run(run(kind, 2, fast_s, tokens, alone=False)))

    def rate(runs: list[Run]) -> float:
        return statistics.median(r.tokens_per_s for r in runs)

    def per_cpu_s(runs: list[Run]) -> float:
        return statistics.median(1e6 / r.cpu_us for r in runs)

    def added(share: float) -> float:
        return statistics.median(r.added_ms[int(len(r.added_ms) * share)] for r in paced)

    at_pace = f"{how}; a step every {step_s * 1e3:.0f} ms, router alone on a core"
    offered = f"{how}; workers offer {MORE:,.0f}/s, router alone on a core"
    free = f"{how}; workers offer {MORE:,.0f}/s, nobody is pinned: {os.cpu_count()} cores for routers, workers and client"
    one_core, shared = "relayed by one router on one core", "two routers over one, sharing two cores"
    return [
        Row(f"streams.{name}.per_core", f"{name}: {one_core}", rate(most), "tokens/s", RELAY_BAR, how=offered),
        Row(f"streams.{name}.cpu", f"{name}: its CPU time per token", 1e6 / per_cpu_s(most), "us", how=how),
        Row(f"streams.{name}.paced", f"{name}: relayed at a pace of {PACE:,.0f}/s", rate(paced), "tokens/s", how=at_pace),
        Row(f"streams.{name}.itl_p99", f"{name}: added to a gap, p99", added(0.99), "ms", ITL_BAR_MS, "<=", how=at_pace),
        Row(f"streams.{name}.itl_p50", f"{name}: the same, median", added(0.5), "ms", how=at_pace),
        Row(f"streams.{name}.two", f"{name}: {shared}", rate(two) / rate(one), "x", SCALE_BAR, how=free),
        Row(
            f"streams.{name}.two_cpu",
            f"{name}: two routers over one, were each on a core of its own",
            2 * per_cpu_s(two) / per_cpu_s(one),
            "x",
            how=f"{free}; twice the tokens per CPU second of two routers over those of one",
        ),
    ]  # fmt: skip


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", choices=("grpc", "sse"), help="one of the two fronts")
    options = parser.parse_args()
    tokens, rounds = (100, 1) if options.quick else (200, 3)
    tokens_of = {GrpcDoor: tokens, SseDoor: 3 * tokens}  # so many that all streams run together for a while
    kinds = [kind for kind in (GrpcDoor, SseDoor) if options.only in (None, kind.name)]
    report([row for kind in kinds for row in rows_of(kind, tokens_of[kind], rounds)], options.json)


if __name__ == "__main__":
    main()
