"""`tandem down`: end a running cluster."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer


def down(
    grpc: Annotated[str | None, typer.Option(help="The cluster's gRPC address; default: the one running here.")] = None,
    admin: Annotated[str | None, typer.Option(help="The cluster's admin address; it may be on another machine.")] = None,
    timeout: Annotated[float, typer.Option(min=1.0, help="Seconds to wait for it to be gone.")] = 60.0,
) -> None:
    """End a cluster as SIGTERM would: what runs may finish within the grace time. Returns when it is gone."""
    from cli import admin as calls
    from cli.running import admin_address, find
    from tandem.errors import DeadlineExceededError, UnavailableError

    try:
        running = find(grpc, admin)
    except UnavailableError:
        if not (grpc or admin):
            raise
        running = None
    calls.shut_down(admin_address(grpc, admin))
    if running is None:
        typer.echo("the cluster is ending")
        return
    try:
        asyncio.run(_gone(running.pid, timeout))
    except TimeoutError:
        raise DeadlineExceededError(f"process {running.pid} is still there after {timeout:g} s") from None
    typer.echo("the cluster has ended")


async def _gone(pid: int, timeout_s: float) -> None:
    from cluster.launcher import process_gone

    async with asyncio.timeout(timeout_s):
        await process_gone(pid)
