"""Finds the rate up to which nine in ten requests are within their limits."""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import islice
from statistics import fmean

from benchmarks.azure_lengths import Conversations
from cli.load import OpenTarget, Target, run_open, send
from core.latency import RequestTrace, rate_at, summarize
from core.request import Slo
from tandem.errors import UnavailableError

SHARE = 0.9
STEP = 1.5
"""Between rates, until one attains and the next does not."""
STEPS_MAX = 7
HOPELESS = 3
"""Rates, each lower than the one before, at which nobody was within the limits: whoever misses them all needs no more."""
SETTLE_S = 0.7
"""After each measurement: what a cluster puts off must not fall into the next one's turn."""
UNLOADED = 12
READY_S, PAUSE_S = 90.0, 0.3


@dataclass(slots=True)
class Curve:
    """Attainment at each offered rate that was measured. `mean`: with the mean TPOT in place of TBT."""

    joint: dict[float, float] = field(default_factory=dict)
    mean: dict[float, float] = field(default_factory=dict)
    requests: int = 0

    @property
    def rate(self) -> float | None:
        return rate_at([*self.joint.items()], SHARE)

    @property
    def mean_rate(self) -> float | None:
        return rate_at([*self.mean.items()], SHARE)

    def add(self, rate: float, traces: list[RequestTrace], slo: Slo) -> float:
        """Returns the attainment."""
        self.requests += len(traces)
        return self.put(rate, traces, slo)

    def put(self, rate: float, traces: list[RequestTrace], slo: Slo) -> float:
        """In place of what was known at this rate."""
        found = summarize(traces, slo, 1.0)["attainment"]
        self.joint[rate], self.mean[rate] = found["joint"], found["joint_mean"]
        return self.joint[rate]


@dataclass(frozen=True, slots=True)
class Plan:
    """How long each rate is offered, and how often an interval is halved once there is one."""

    duration_s: float
    halvings: int
    first_rate: float


_KINDS: tuple[Callable[[RequestTrace], float | None], ...] = (
    lambda trace: trace.ttft_s,
    lambda trace: trace.tbt_s,
    lambda trace: trace.tpot_s,
)


async def unloaded(target: Target, load: Conversations, count: int = UNLOADED) -> tuple[float, ...]:
    """Means of TTFT, TBT and mean TPOT of requests one at a time."""
    now = asyncio.get_running_loop().time
    traces = [await send(target, job, now()) for job in islice(load.one_by_one(seed=77), count)]
    failed = [trace.error for trace in traces if trace.error]
    if failed:
        raise RuntimeError(f"an unloaded request failed: {failed[0]}")
    return tuple(fmean(value for trace in traces if (value := kind(trace)) is not None) for kind in _KINDS)


async def offer(
    target: Target, load: Conversations, rate: float, duration_s: float, seed: int, content: int = 0
) -> list[RequestTrace]:
    traces = await run_open(target, load.jobs(rate, duration_s, seed, content), lambda trace: None)
    await asyncio.sleep(SETTLE_S)
    return traces


async def search(target: Target, load: Conversations, slo: Slo, plan: Plan, name: str) -> Curve:
    """Rates a factor apart until the share is attained at one and not at the next, then halves between these two."""
    curve = Curve()

    async def attained(rate: float) -> float:
        seed = 1 + len(curve.joint)
        found = curve.add(rate, await offer(target, load, rate, plan.duration_s, seed), slo)
        say(f"{name}: {found:.0%} of {rate:.2f}/s")
        return found

    rate = plan.first_rate
    up = await attained(rate) >= SHARE
    for _ in range(STEPS_MAX):
        rate = rate * STEP if up else rate / STEP
        if (await attained(rate) >= SHARE) != up or [*curve.joint.values()][-HOPELESS:] == [0.0] * HOPELESS:
            break
    for _ in range(plan.halvings):
        met = [rate for rate, share in curve.joint.items() if share >= SHARE]
        missed = [rate for rate, share in curve.joint.items() if share < SHARE]
        if not (met and missed):
            break
        low = max((rate for rate in met if rate < min(missed)), default=None)
        if low is None:
            break
        await attained(math.sqrt(low * min(missed)))
    return curve


@asynccontextmanager
async def warmed(open_target: OpenTarget, load: Conversations, count: int = 4) -> AsyncIterator[Target]:
    """The target once it has answered a few requests: a router may still be starting, or its sessions coming up.

    Raises RuntimeError when that takes longer than READY_S.
    """
    now = asyncio.get_running_loop().time
    deadline = now() + READY_S
    async with AsyncExitStack() as stack:
        while True:
            try:
                target = await stack.enter_async_context(open_target())
                break
            except UnavailableError as error:
                if now() > deadline:
                    raise RuntimeError(f"it does not start: {error.message}") from None
            await asyncio.sleep(PAUSE_S)
        source, done = load.one_by_one(seed=99), 0
        while done < count:
            trace = await send(target, next(source), now())
            done += not trace.error
            if trace.error:
                if now() > deadline:
                    raise RuntimeError(f"no request is answered: {trace.error}")
                await asyncio.sleep(PAUSE_S)
        yield target


def say(line: str) -> None:
    """Progress, on standard error."""
    print(line, file=sys.stderr, flush=True)
