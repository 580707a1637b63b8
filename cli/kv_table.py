"""What the verbs of `tandem kv` have in common: options, and tables of what they found."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

PIPED_WIDTH = 140

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Grpc = Annotated[str | None, typer.Option(help="The cluster's gRPC address; default: the one running here.")]
Admin = Annotated[str | None, typer.Option(help="The cluster's admin address.")]
Node = Annotated[str | None, typer.Option(help="Only this node, by its id in `tandem status`.")]


def table(*columns: str, rows: Sequence[tuple[Any, ...]]) -> None:
    """`#` before a column's name sets it to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    for name in columns:
        shown.add_column(name.lstrip("#"), justify="right" if name.startswith("#") else "left", no_wrap=True)
    for row in rows:
        shown.add_row(*map(str, row))
    Console(highlight=False, width=None if sys.stdout.isatty() else PIPED_WIDTH).print(shown)


def span(seconds: float | None) -> str:
    """A length of time in its largest unit, as `42 s` or `3 h`; empty when it is not known."""
    if seconds is None:
        return ""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
