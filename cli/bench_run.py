"""Runs the loads of one benchmark against one target, one after the other."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from cli.load import Job, OpenTarget, Target, run_closed, run_open, send
from cli.progress import Bar
from core.latency import Outcome, RequestTrace
from tandem.errors import UnavailableError


@dataclass(frozen=True, slots=True)
class Load:
    """`jobs`, from the tokens that the served model can hold (None: it did not say). `rate`: offered per second, None: what
    the jobs come to. `concurrency`: of a closed loop, None for an open one."""

    jobs: Callable[[int | None], Iterator[Job]]
    rate: float | None
    concurrency: int | None
    duration_s: float


@dataclass(frozen=True, slots=True)
class Measured:
    """`took_s`: from the start to the last answer. `rate`: offered, None of a closed loop."""

    traces: list[RequestTrace]
    took_s: float
    rate: float | None


async def measure(
    open_target: OpenTarget,
    loads: list[Load],
    warmup: int,
    progress: Progress,
    on_measured: Callable[[Measured], None],
) -> None:
    """`on_measured` hears of each load. Raises UnavailableError when nobody answers a first request."""
    async with open_target() as target:
        for number, load in enumerate(loads):
            progress.begin(number, load)
            jobs = load.jobs(target.context_max)
            first = next(jobs, None)
            if first is not None:
                await _warm(target, first, warmup if number == 0 else 0)
                jobs = itertools.chain([first], jobs)
            on_measured(await _run(target, load, jobs, progress.on_done))


async def _warm(target: Target, job: Job, times: int) -> None:
    for number in range(times):
        trace = await send(target, replace(job, seed=-1 - number), time.monotonic())
        if trace.outcome is not Outcome.COMPLETED:
            raise UnavailableError(f"the first request was not answered: {trace.error}")


async def _run(target: Target, load: Load, jobs: Iterator[Job], on_done: Callable[[RequestTrace], None]) -> Measured:
    if load.concurrency is not None:
        start = time.monotonic()
        traces = await run_closed(target, jobs, load.concurrency, load.duration_s, on_done)
        return Measured(traces, time.monotonic() - start, None)
    due = list(jobs)
    start = time.monotonic()
    traces = await run_open(target, due, on_done)
    rate = load.rate if load.rate is not None else len(due) / load.duration_s
    return Measured(traces, time.monotonic() - start if due else 0.0, rate)


class Progress:
    """What a benchmark shows while it runs."""

    def __init__(self, duration_s: float, loads: int, wanted: bool) -> None:
        from rich.progress import TextColumn, TimeElapsedColumn

        self._bar = Bar(wanted, TextColumn("{task.fields[detail]}"), TimeElapsedColumn())
        self._duration_s, self._loads = duration_s, loads
        self._done = self._failed = 0

    def __enter__(self) -> Progress:
        self._bar.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.__exit__()

    def begin(self, number: int, load: Load) -> None:
        self._done = self._failed = 0
        which = f" {number + 1} of {self._loads}" if self._loads > 1 else ""
        rate = f", {load.rate:g}/s" if load.rate else ""
        self._bar.begin(f"measuring{which}{rate}", self._duration_s)

    def on_done(self, trace: RequestTrace) -> None:
        self._done += 1
        self._failed += trace.outcome is not Outcome.COMPLETED
        self._bar.tell(f"{self._done} answered" + (f", {self._failed} refused or failed" if self._failed else ""))
