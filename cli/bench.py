"""`tandem bench`: offer load, measure what users would feel."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from sim.workload_shapes import Arrivals

if TYPE_CHECKING:
    from cli.bench_run import Load
    from cli.load import OpenTarget
    from cli.targets import Asked
    from cli.workload import Replay, Workload

SERVER, LOAD, PROMPTS, LIMITS, OUT = "Server", "Load", "Requests", "Limits", "Report"


def bench(
    url: Annotated[
        str | None, typer.Option(help="An OpenAI-compatible server, http://HOST:PORT.", rich_help_panel=SERVER)
    ] = None,
    grpc: Annotated[
        str | None, typer.Option(help="A Tandem cluster; default: the one running here.", rich_help_panel=SERVER)
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds until a request counts as failed.", rich_help_panel=SERVER)
    ] = 120.0,
    api_key: Annotated[str, typer.Option(help="Whose requests they are.", rich_help_panel=SERVER)] = "",
    ids: Annotated[
        bool, typer.Option("--ids", help="Of --url: prompts of token ids, exact in length, not words.", rich_help_panel=SERVER)
    ] = False,
    rate: Annotated[
        str | None,
        typer.Option(metavar="R[,R…]", help="Requests per second, sent when due (open loop).", rich_help_panel=LOAD),
    ] = None,
    arrivals: Annotated[Arrivals, typer.Option(help="Of an open loop.", rich_help_panel=LOAD)] = Arrivals.POISSON,
    cv: Annotated[
        float | None,
        typer.Option(min=0, help="Of gamma arrivals: gaps' deviation over their mean; 1 is Poisson.", rich_help_panel=LOAD),
    ] = None,
    trace: Annotated[
        str | None,
        typer.Option(
            help="Replay the arrivals and lengths of this file (open loop); one of lengths alone at --rate.",
            rich_help_panel=LOAD,
        ),
    ] = None,
    speed: Annotated[
        str, typer.Option(metavar="X[,X…]", help="Of the replay: 2 halves every gap.", rich_help_panel=LOAD)
    ] = "1",
    concurrency: Annotated[
        int, typer.Option(min=1, help="Else: clients that each wait for their answer.", rich_help_panel=LOAD)
    ] = 1,
    duration: Annotated[
        float, typer.Option(min=0.1, help="Seconds during which requests are sent.", rich_help_panel=LOAD)
    ] = 10.0,
    requests: Annotated[int | None, typer.Option(min=1, help="At most this many.", rich_help_panel=LOAD)] = None,
    warmup: Annotated[int, typer.Option(min=0, help="Requests before measuring.", rich_help_panel=LOAD)] = 1,
    seed: Annotated[int, typer.Option(help="Of arrivals and prompts.", rich_help_panel=LOAD)] = 0,
    input_tokens: Annotated[
        str | None,
        typer.Option(metavar="N|LOW-HIGH", help="Of each prompt (128); of a trace, at most N.", rich_help_panel=PROMPTS),
    ] = None,
    output_tokens: Annotated[
        str | None,
        typer.Option(metavar="N|LOW-HIGH", help="Of each answer (32); of a trace, at most N.", rich_help_panel=PROMPTS),
    ] = None,
    length_scale: Annotated[
        float, typer.Option(min=1e-6, help="Of a trace: multiplies its lengths.", rich_help_panel=PROMPTS)
    ] = 1.0,
    shared_tokens: Annotated[
        int, typer.Option(min=0, help="Leading tokens that prompts have in common.", rich_help_panel=PROMPTS)
    ] = 0,
    shared_prefixes: Annotated[int, typer.Option(min=1, help="So many different ones of them.", rich_help_panel=PROMPTS)] = 1,
    ttft_slo: Annotated[
        float | None, typer.Option(help="Of the time to the first token, in seconds.", rich_help_panel=LIMITS)
    ] = None,
    tbt_slo: Annotated[
        float | None, typer.Option(help="Of the mean of a request's slowest tenth of gaps.", rich_help_panel=LIMITS)
    ] = None,
    tpot_slo: Annotated[float | None, typer.Option(help="Of a request's mean gap.", rich_help_panel=LIMITS)] = None,
    slo_class: Annotated[str, typer.Option(help="The class that requests name.", rich_help_panel=LIMITS)] = "",
    declare: Annotated[
        bool | None,
        typer.Option(help="Tell the server of the limits. Default: a Tandem cluster over gRPC.", rich_help_panel=LIMITS),
    ] = None,
    as_json: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write it here; - prints it.", rich_help_panel=OUT)
    ] = None,
    plot: Annotated[
        str | None, typer.Option(metavar="PNG", help="Of several rates: attainment against rate.", rich_help_panel=OUT)
    ] = None,
) -> None:
    """Measure latency, attainment and goodput under load. Latency counts from the moment a request was due.

    With several rates (or speeds) each is measured in turn; the JSON then holds one report per rate under `runs`. Exit status 1
    when no request at all was answered.
    """
    import asyncio

    from cli.bench_report import Report
    from cli.bench_run import Progress, measure
    from cli.targets import Asked
    from cli.workload import Replay, Sharing, Workload
    from cli.written import check_writable
    from core.request import Slo
    from router.slo import check_limits
    from sim.trace_arrivals import Missing
    from sim.traces import trace_format
    from sim.workload_lengths import TokenRange
    from tandem.errors import InvalidRequestError

    if url and grpc:
        raise InvalidRequestError("give --url or --grpc, not both")
    if rate and trace and not trace_format(trace).untimed:
        raise InvalidRequestError("give --rate or --trace, not both; --speed changes a trace's rate")
    if cv is not None and arrivals is not Arrivals.GAMMA:
        raise InvalidRequestError("--cv is the burstiness of gamma arrivals; add --arrivals gamma")
    rates: list[float | None] = [*_numbers(rate, "--rate")] if rate else [None]
    speeds = _numbers(speed, "--speed")
    if plot and len(speeds if trace and not rate else rates) < 2:
        raise InvalidRequestError("--plot draws attainment against rate; give several, as in --rate 1,2,4,8")
    if plot:
        _check_plot()
    check_writable(as_json, plot)
    inputs, outputs = (
        TokenRange.parse(text or str(default), option)
        for text, default, option in ((input_tokens, 128, "--input-tokens"), (output_tokens, 32, "--output-tokens"))
    )
    loads: list[Load]
    if trace:
        most = inputs.high if input_tokens else float("inf"), outputs.high if output_tokens else float("inf")
        shape = {Arrivals.POISSON: 1.0, Arrivals.CONSTANT: 0.0}.get(arrivals, 1.0 if cv is None else cv)
        replays = [
            Replay(trace, one, length_scale, *most, seed, Missing(at, shape, outputs.high, seed))
            for at in rates
            for one in speeds
        ]
        loads = [_replayed(replay, duration, requests) for replay in replays]
    else:
        work = Workload(inputs, outputs, Sharing(shared_tokens, shared_prefixes), arrivals, 1.0 if cv is None else cv, seed)
        loads = [_drawn(work, one, concurrency, duration, requests) for one in rates]
    slo = Slo(ttft_slo, tbt_slo, tpot_slo)
    check_limits(Slo(ttft_slo, tbt_slo), None)
    check_limits(Slo(tpot_s=tpot_slo), None)  # beside a lower limit of TBT it is idle, and can still be measured
    told = slo if (declare if declare is not None else not url) else Slo()
    target = _target(url, grpc, Asked(timeout, api_key, told, slo_class), ids)
    report = Report(slo, plot)
    with Progress(duration, len(loads), sys.stderr.isatty()) as progress:
        asyncio.run(measure(target, loads, warmup, progress, report.add))
    report.write(as_json)
    if report.nothing_served:
        from cli.app import FAILED

        sys.stderr.write(f"tandem: {report.nothing_served}\n")
        raise typer.Exit(FAILED)


def _target(url: str | None, grpc: str | None, asked: Asked, ids: bool) -> OpenTarget:
    import functools

    from cli.running import grpc_address
    from cli.targets import open_grpc, open_http

    return functools.partial(open_http, url, asked, ids) if url else functools.partial(open_grpc, grpc_address(grpc), asked)


def _drawn(work: Workload, rate: float | None, concurrency: int, duration_s: float, requests: int | None) -> Load:
    import itertools

    from cli.bench_run import Load

    jobs = work.closed() if rate is None else work.open(rate, duration_s)
    return Load(lambda _: itertools.islice(jobs, requests), rate, concurrency if rate is None else None, duration_s)


def _replayed(replay: Replay, duration_s: float, requests: int | None) -> Load:
    import itertools

    from cli.bench_run import Load

    return Load(lambda most: itertools.islice(replay.open(duration_s, most), requests), None, None, duration_s)


def _numbers(text: str, option: str) -> list[float]:
    from tandem.errors import InvalidRequestError

    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(0.001 <= number <= 1e6 for number in numbers):
        raise InvalidRequestError(f"{option} must be one or several numbers above 0, separated by commas, got {text!r}")
    return numbers


def _check_plot() -> None:
    """Before an hour of measuring, not after."""
    import importlib.util

    from tandem.errors import InvalidRequestError

    if importlib.util.find_spec("matplotlib") is None:
        raise InvalidRequestError('--plot needs matplotlib: pip install "tandem[plot]"')
