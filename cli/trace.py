"""`tandem trace`: what a recorded workload is like."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

trace = typer.Typer(no_args_is_help=True, help="Look at traces: files of requests of the past.")


@trace.command()
def stat(
    file: Annotated[str, typer.Argument(help="Any trace that `bench` and `sim` replay, gzipped or not.", metavar="FILE")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say how many requests there are, how they come, how long they are, and what a cache would find of them."""
    from sim.trace_stat import stat_of

    figures = stat_of(file)
    if as_json:
        typer.echo(json.dumps(figures, indent=2))
    else:
        _show(file, figures)


def _show(file: str, figures: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    console.print(f"[bold]{figures['requests']:,}[/] requests, {_kind(figures['format'])}: {file}", soft_wrap=True)
    if figures["rate_rps"] is not None:
        console.print(
            f"{figures['rate_rps']:.4g} per second for {_number(figures['span_s'])} s; "
            f"CV of the gaps {_number(figures['arrival_cv'])}, busiest minute {_number(figures['busiest_minute'])} x the mean",
            soft_wrap=True,
        )
    who = ", ".join(f"{figures[name]:,} {name}" for name in ("tenants", "sessions") if figures[name] > 1)
    if who:
        console.print(who)
    for title, columns, rows in _tables(figures):
        _table(console, title, columns, rows)


def _kind(format: str) -> str:
    return {"lengths": "lengths without times", "inputs": "without lengths of answers"}.get(format, f"{format} format")


def _tables(figures: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, columns and rows of each table worth showing."""
    lengths = [["input", *_numbers(figures["input_tokens"])], ["output", *_numbers(figures["output_tokens"])]]
    tables = [("tokens", ["", *figures["input_tokens"]], lengths)]
    if figures["dispersion"] is not None:
        bins = [f"{width} s" for width in figures["dispersion"]]
        tables.append(("arrivals in bins of", ["", *bins], [["variance / mean", *_numbers(figures["dispersion"])]]))
    if "lru_hit_ratio" in figures:
        found = figures["lru_hit_ratio"]
        capacities = [f"{int(name):,}" if name.isdigit() else name for name in found]
        title = f"{figures['blocks']:,} blocks, {figures['blocks_distinct']:,} different; an LRU cache of so many finds"
        tables.append((title, ["", *capacities], [["hit ratio", *(f"{ratio:.4f}" for ratio in found.values())]]))
    return tables


def _numbers(values: dict[str, float | None]) -> list[str]:
    return [_number(value) for value in values.values()]


def _number(value: float | None) -> str:
    if value is None:
        return "—"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _table(console: Any, title: str, columns: list[str], rows: list[list[str]]) -> None:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)
