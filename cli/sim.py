"""`tandem sim`: what a cluster would do with a workload, on virtual time."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cli.progress import Bar
    from core.config import Config
    from sim.faults import Fault
    from sim.workload import Arrival
    from sim.world import World


def sim(
    config: Annotated[str, typer.Option(metavar="FILE", help="As for `tandem up`, with a `sim:` part.")],
    trace: Annotated[
        str | None, typer.Option(metavar="FILE", help="The arrivals; default: sim.rate_rps for sim.duration_s.")
    ] = None,
    policy: Annotated[str | None, typer.Option(metavar="NAME", help="Of placement; default: router.policy.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same result.")] = 0,
    faults: Annotated[
        str | None, typer.Option(metavar="FILE", help="What goes wrong, and when: a list, or a trace of spot instances.")
    ] = None,
    rate_scale: Annotated[float, typer.Option(help="2 halves every gap between arrivals.")] = 1.0,
    checks: Annotated[bool, typer.Option("--checks", help="Look for broken rules after every event; slow.")] = False,
    as_json: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write it here; - prints it.")] = None,
    html: Annotated[str | None, typer.Option("--report", metavar="FILE", help="Write a page with pictures here.")] = None,
) -> None:
    """Run routers, schedulers and the controller against a cost model instead of machines."""
    from cli.progress import Bar
    from cli.written import check_writable
    from core.config import load
    from sim.report import write_html
    from sim.report_timeline import Timeline
    from sim.run import simulate

    loaded = load(config)
    check_writable(as_json, html)
    arrivals = _read(trace, loaded, seed) if trace is not None else None
    timeline = Timeline()
    with Bar(sys.stderr.isatty(), *_columns()) as bar:
        bar.begin("simulating", 1.0)
        result = simulate(
            loaded,
            arrivals,
            policy,
            seed,
            rate_scale=rate_scale,
            faults=_faults(faults, loaded) if faults is not None else (),
            checks=checks,
            prepare=timeline.watch if html else lambda world: None,
            on_look=_watch(bar, _end_s(loaded, trace, seed, rate_scale)),
        )
    if html:
        write_html(html, result.report, result.errors, loaded, timeline)
    _write(result.report, result.errors, as_json)


def _columns() -> tuple[Any, ...]:
    from rich.progress import TextColumn, TimeElapsedColumn, TimeRemainingColumn

    return TextColumn("{task.fields[detail]}"), TimeElapsedColumn(), TimeRemainingColumn()


def _read(trace: str, config: Config, seed: int) -> Iterator[Arrival]:
    """The trace, and what it leaves out from the configuration."""
    from sim.trace_arrivals import Missing, arrivals_of, context_of

    sim = config.sim
    missing = Missing(sim.rate_rps or None, sim.arrival_cv, sim.output_tokens, seed)
    return arrivals_of(trace, missing, context_of(config))


def _faults(path: str, config: Config) -> list[Fault]:
    from sim.cluster import spot_names, worker_names
    from sim.faults import as_recorded, read_faults
    from sim.plane import store_names

    found = read_faults(path, worker_names(config), store_names(config), spot_names(config))
    return as_recorded(found, config.sim.notice_s)


def _end_s(config: Config, trace: str | None, seed: int, rate_scale: float) -> float | None:
    """When the last request comes, so that the bar knows how much is left; a trace is read for it where somebody looks."""
    end_s = config.sim.duration_s
    if trace is None or not sys.stderr.isatty():
        return end_s
    last_s = max((each.arrival_s for each in _read(trace, config, seed)), default=0.0) / rate_scale
    return min(last_s, end_s) if end_s is not None else last_s


def _watch(bar: Bar, duration_s: float | None) -> Callable[[World], None]:
    """How far it is: in time where its end is known."""

    def look(world: World) -> None:
        detail = f"{world.events.now():.0f} s, {world.arrived} arrived, {len(world.users.live)} under way"
        bar.reach(world.events.now() / duration_s if duration_s else 0.0, detail)

    return look


def _write(report: dict[str, Any], errors: dict[str, int], path: str | None) -> None:
    import json

    from cli.written import write_text

    text = json.dumps(report, indent=2) + "\n"
    if path == "-":
        typer.echo(text, nl=False)
        return
    if path:
        write_text(path, text)
    _show(report, errors)


def _show(report: dict[str, Any], errors: dict[str, int]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{report['completed']} of {report['requests']} requests in {report['duration_s']:.1f} s of virtual time",
        title_justify="left",
    )
    table.add_column("milliseconds")
    columns = ("p50", "p90", "p99", "mean")
    for name in columns:
        table.add_column(name, justify="right")
    for key, label in _LABELS.items():
        spread = report[key]
        table.add_row(label, *("" if spread[name] is None else f"{spread[name] * 1e3:.1f}" for name in columns))
    console = Console()
    console.print(table)
    met = report["attainment"]
    console.print(
        f"goodput {report['goodput_rps']:.2f} requests/s, {report['goodput_rps_per_gpu']:.4f} per GPU (of {report['gpus']})"
        f" · {met['joint']:.1%} met their limits (TTFT {met['ttft']:.1%}, TBT {met['tbt']:.1%}; by mean TPOT"
        f" {met['joint_mean']:.1%})\n{report['events']} events in {report['wall_s']:.1f} s · prefixes found"
        f" {report['prefix_hit_ratio']:.1%} · policy {report['policy']}, seed {report['seed']}",
        highlight=False,
    )
    if plane := report.get("kv_plane"):
        console.print(
            f"stores took {plane['taken_blocks']:,} blocks, refused {plane['refused_blocks']:,} · {plane['fetched_blocks']:,}"
            f" were fetched, {plane['fetched_from_stores']:,} from stores · {plane['unanswered']:,} questions to the directory"
            " had no answer",
            highlight=False,
        )
    for code, count in errors.items():
        console.print(f"[red]{count} ×[/] {code}", highlight=False)


_LABELS = {
    "ttft_s": "time to first token",
    "itl_s": "gap between tokens",
    "tpot_s": "mean gap of a request",
    "tbt_s": "slowest tenth of gaps",
    "e2e_s": "whole request",
}
