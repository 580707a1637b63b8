"""`tandem status`: who is in the cluster and how it fares."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from cluster.report import ClusterSnapshot, Member

SILENT_S = 3.0  # heartbeats come every two
PIPED_WIDTH = 120
_COLOURS = {"ready": "green", "starting": "yellow", "draining": "yellow", "dead": "red"}


def status(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    grpc: Annotated[str | None, typer.Option(help="The cluster's gRPC address; default: the one running here.")] = None,
    admin: Annotated[str | None, typer.Option(help="The cluster's admin address.")] = None,
) -> None:
    """Show the workers of a cluster."""
    from cli import admin as calls
    from cli.running import admin_address

    snapshot = calls.status(admin_address(grpc, admin))
    if as_json:
        typer.echo(json.dumps(shape(snapshot), indent=2))
    else:
        _show(snapshot)


def shape(snapshot: ClusterSnapshot) -> dict[str, Any]:
    """The JSON form: `{"workers": [...], "model", "version"}`."""
    return {
        "workers": [_worker(member) for member in snapshot.members],
        "model": snapshot.model,
        "version": snapshot.tandem_version,
    }


def _worker(member: Member) -> dict[str, Any]:
    report = member.report
    return {
        "id": report.worker_id,
        "role": report.role.value,
        "pid": report.pid,
        "node": report.node,
        "epoch": report.epoch,
        "state": report.state.value,
        "grpc": report.grpc_address,
        "http": report.http_address,
        "metrics": report.metrics_address,
        "peer": report.peer_address,
        "blocks": report.blocks._asdict(),
        "leases_open": report.leases_open,
        "running": report.running,
        "waiting": report.waiting,
        "age_s": round(member.age_s, 3),
        "detail": report.detail,
    }


def _show(snapshot: ClusterSnapshot) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("worker", "role", "state", "epoch", "pid", "gRPC"):
        table.add_column(name, no_wrap=True)
    for name in ("runs", "waits", "KV blocks", "leases"):
        table.add_column(name, justify="right", no_wrap=True)
    for member in snapshot.members:
        report, blocks = member.report, member.report.blocks
        silent = " (silent)" if member.age_s > SILENT_S and report.state.value == "ready" else ""
        table.add_row(
            report.worker_id,
            report.role.value,
            f"[{_COLOURS[report.state.value]}]{report.state.value}{silent}[/]",
            str(report.epoch),
            str(report.pid or ""),
            report.grpc_address,
            str(report.running),
            str(report.waiting),
            f"{blocks.active + blocks.cached}/{blocks.total}" if blocks.total else "",
            str(report.leases_open) if blocks.total else "",
        )
    console = Console(highlight=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)
    console.print(f"[bold]{snapshot.model}[/] · tandem {snapshot.tandem_version}")
    console.print(table)
    for member in snapshot.members:
        if (proposal := member.report.proposal) is not None:
            console.print(f"{member.report.worker_id} proposes {proposal.role.value} for {proposal.target}: {proposal.reason}")
        if member.report.state.value == "dead":
            console.print(f"[red]{member.report.worker_id}[/] is dead: {member.report.detail}")
