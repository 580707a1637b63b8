"""`tandem drain`: take one worker out of service without losing what it runs."""

from __future__ import annotations

from typing import Annotated

import typer


def drain(
    target: Annotated[str, typer.Argument(help="A worker's id, as `tandem status` shows it.")],
    deadline: Annotated[float, typer.Option(min=0.0, help="Seconds until it is ended whatever still runs.")] = 60.0,
    grpc: Annotated[str | None, typer.Option(help="The cluster's gRPC address; default: the one running here.")] = None,
    admin: Annotated[str | None, typer.Option(help="The cluster's admin address.")] = None,
) -> None:
    """Let a worker finish what it has, give it nothing new, and start its successor."""
    from cli import admin as calls
    from cli.running import admin_address

    typer.echo(calls.drain(admin_address(grpc, admin), target, deadline))
