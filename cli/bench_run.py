"""Runs the loads of one benchmark against one target, one after the other."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from cli.load import Job, OpenTarget, Target, run_closed, run_open, send
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
    """A bar on standard error, when that is a terminal."""

    def __init__(self, duration_s: float, loads: int, wanted: bool) -> None:
        self._progress: Any = None
        self._duration_s, self._loads = duration_s, loads
        self._task: Any = None
        self._done = self._failed = 0
        if wanted:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bars

            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[detail]}"), TimeElapsedColumn())
            self._progress = Bars(*columns, console=Console(stderr=True), transient=True)

    def __enter__(self) -> Progress:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def begin(self, number: int, load: Load) -> None:
        self._done = self._failed = 0
        if self._progress is not None:
            if self._task is not None:
                self._progress.remove_task(self._task)
            which = f" {number + 1} of {self._loads}" if self._loads > 1 else ""
            rate = f", {load.rate:g}/s" if load.rate else ""
            self._task = self._progress.add_task(f"measuring{which}{rate}", total=self._duration_s, detail="")

    def on_done(self, trace: RequestTrace) -> None:
        self._done += 1
        self._failed += trace.outcome is not Outcome.COMPLETED
        if self._progress is not None:
            detail = f"{self._done} answered" + (f", {self._failed} refused or failed" if self._failed else "")
            task = self._progress.tasks[-1]
            self._progress.update(self._task, completed=task.elapsed, detail=detail)
