"""`tandem bench`: offer load, measure what users would feel."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cli.load import Job, OpenTarget
    from core.latency import RequestTrace


def bench(
    url: Annotated[str | None, typer.Option(help="An OpenAI-compatible server, http://HOST:PORT.")] = None,
    grpc: Annotated[str | None, typer.Option(help="A Tandem cluster's gRPC address; default: the one running here.")] = None,
    rate: Annotated[float | None, typer.Option(min=0.001, help="Requests per second, sent when due (open loop).")] = None,
    arrivals: Annotated[str, typer.Option(help="Of an open loop: poisson or constant.")] = "poisson",
    trace: Annotated[str | None, typer.Option(help="Replay the arrivals and lengths of this file (open loop).")] = None,
    speed: Annotated[float, typer.Option(min=0.001, help="Of the replay: 2 halves every gap between arrivals.")] = 1.0,
    concurrency: Annotated[int, typer.Option(min=1, help="Else: clients that each wait for their answer.")] = 1,
    duration: Annotated[float, typer.Option(min=0.1, help="Seconds during which requests are sent.")] = 10.0,
    requests: Annotated[int | None, typer.Option(min=1, help="At most this many requests.")] = None,
    input_tokens: Annotated[int, typer.Option(min=1, help="Length of each prompt; of a trace, at most.")] = 128,
    output_tokens: Annotated[int, typer.Option(min=1, help="Length of each answer; of a trace, at most.")] = 32,
    seed: Annotated[int, typer.Option(help="Of arrivals and prompts.")] = 0,
    warmup: Annotated[int, typer.Option(min=0, help="Requests sent before measuring.")] = 1,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds until a request counts as failed.")] = 120.0,
    ttft_slo: Annotated[float | None, typer.Option(help="Limit of the time to the first token, in seconds.")] = None,
    tbt_slo: Annotated[float | None, typer.Option(help="Limit of the mean of a request's slowest tenth of gaps.")] = None,
    tpot_slo: Annotated[float | None, typer.Option(help="Limit of a request's mean gap.")] = None,
    as_json: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write the report here; - prints it.")] = None,
) -> None:
    """Measure latency, attainment and goodput under load. Latency counts from the moment a request was due."""
    import asyncio
    import functools

    from cli.running import grpc_address
    from cli.targets import open_grpc, open_http
    from core.latency import summarize
    from core.request import Slo
    from tandem.errors import InvalidRequestError

    if url and grpc:
        raise InvalidRequestError("give --url or --grpc, not both")
    if rate and trace:
        raise InvalidRequestError("give --rate or --trace, not both; --speed changes a trace's rate")
    if arrivals not in ("poisson", "constant"):
        raise InvalidRequestError(f"--arrivals must be poisson or constant, got {arrivals!r}")
    target: OpenTarget = (
        functools.partial(open_http, url, timeout) if url else functools.partial(open_grpc, grpc_address(grpc), timeout)
    )
    if trace:
        jobs = _replay(trace, speed, duration, input_tokens, output_tokens, seed)
    else:
        jobs = _jobs(_due(rate, arrivals == "poisson", seed, duration), input_tokens, output_tokens, seed)
    is_open = rate is not None or trace is not None
    run = _Run(target, itertools.islice(jobs, requests), is_open, concurrency, duration, warmup)
    with _Bar(duration, sys.stderr.isatty()) as bar:
        traces, took_s = asyncio.run(run(bar.on_done))
    report = summarize(traces, Slo(ttft_slo, tbt_slo, tpot_slo), took_s)
    if as_json and as_json != "-":
        Path(as_json).write_text(json.dumps(report, indent=2) + "\n")
    if as_json == "-":
        typer.echo(json.dumps(report, indent=2))
    else:
        _show(report, traces)


def _due(rate: float | None, poisson: bool, seed: int, duration_s: float) -> Iterator[float]:
    """When each request is due; of a closed loop always now."""
    import random

    from cli.load import arrivals

    if rate is None:
        return itertools.repeat(0.0)
    return itertools.takewhile(lambda due: due < duration_s, arrivals(rate, poisson, random.Random(seed)))


def _jobs(due: Iterator[float], input_tokens: int, output_tokens: int, seed: int) -> Iterator[Job]:
    from cli.load import Job

    for number, at in enumerate(due):
        yield Job(at, input_tokens, output_tokens, seed * 1_000_003 + number)


def _replay(path: str, speed: float, duration_s: float, input_max: int, output_max: int, seed: int) -> Iterator[Job]:
    """The trace's requests due within `duration_s`, their lengths capped to what the served model can hold."""
    from cli.load import Job
    from core.trace import read_trace

    for number, request in enumerate(read_trace(path)):
        due_s = request.arrival_s / speed
        if due_s >= duration_s:
            return
        lengths = min(request.input_tokens, input_max), max(1, min(request.output_tokens, output_max))
        yield Job(due_s, *lengths, seed * 1_000_003 + number, request.prefix_ids)


class _Run:
    """One measurement: open the target, warm it up, offer the load."""

    def __init__(
        self, target: OpenTarget, jobs: Iterator[Job], is_open: bool, concurrency: int, duration_s: float, warmup: int
    ) -> None:
        self._target, self._jobs, self._is_open = target, jobs, is_open
        self._concurrency, self._duration_s, self._warmup = concurrency, duration_s, warmup

    async def __call__(self, on_done: Callable[[RequestTrace], None]) -> tuple[list[RequestTrace], float]:
        """The traces and the seconds from the start to the last answer."""
        import time
        from dataclasses import replace

        from cli.load import run_closed, run_open, send
        from core.latency import Outcome
        from tandem.errors import UnavailableError

        async with self._target() as target:
            jobs, first = self._jobs, next(self._jobs, None)
            if first is None:
                return [], 0.0
            for number in range(self._warmup):
                trace = await send(target, replace(first, seed=-1 - number), time.monotonic())
                if trace.outcome is not Outcome.COMPLETED:
                    raise UnavailableError(f"the first request was not answered: {trace.error}")
            jobs = itertools.chain([first], jobs)
            start = time.monotonic()
            if self._is_open:
                traces = await run_open(target, list(jobs), on_done)
            else:
                traces = await run_closed(target, jobs, self._concurrency, self._duration_s, on_done)
            return traces, time.monotonic() - start


class _Bar:
    """Progress on standard error, when that is a terminal."""

    def __init__(self, duration_s: float, wanted: bool) -> None:
        self._progress: Any = None
        self._done = self._failed = 0
        if wanted:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[detail]}"), TimeElapsedColumn())
            self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._progress.add_task("measuring", total=duration_s, detail="")

    def __enter__(self) -> _Bar:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def on_done(self, trace: RequestTrace) -> None:
        self._done += 1
        self._failed += trace.outcome.value != "completed"
        if self._progress is not None:
            detail = f"{self._done} answered" + (f", {self._failed} refused or failed" if self._failed else "")
            self._progress.update(self._task, completed=self._progress.tasks[0].elapsed, detail=detail)


def _show(report: dict[str, Any], traces: list[RequestTrace]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{report['completed']} of {report['requests']} requests in {report['duration_s']:.1f} s", title_justify="left"
    )
    table.add_column("milliseconds")
    for name in ("p50", "p90", "p99", "mean"):
        table.add_column(name, justify="right")
    labels = {
        "ttft_s": "time to first token",
        "itl_s": "gap between tokens",
        "tpot_s": "mean gap of a request",
        "tbt_s": "slowest tenth of gaps",
        "e2e_s": "whole request",
    }
    for key, label in labels.items():
        cells = [report[key][name] for name in ("p50", "p90", "p99", "mean")]
        table.add_row(label, *("" if cell is None else f"{cell * 1000:.1f}" for cell in cells))
    console = Console()
    console.print(table)
    attained = report["attainment"]
    console.print(
        f"{report['output_tokens_per_s']:.0f} tokens/s · goodput {report['goodput_rps']:.2f} requests/s "
        f"({attained['joint']:.0%} met their limits; by mean TPOT {attained['joint_mean']:.0%})"
    )
    for error, count in _errors(traces):
        console.print(f"[red]{count} ×[/] {error}", highlight=False)


def _errors(traces: list[RequestTrace]) -> list[tuple[str, int]]:
    from collections import Counter

    return Counter(trace.error for trace in traces if trace.error).most_common(5)
