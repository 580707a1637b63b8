"""`tandem role`: have a running worker compute prompts instead of streams, or the other way round."""

from __future__ import annotations

from typing import Annotated

import typer

from tandem.errors import InvalidRequestError


def role(
    target: Annotated[str, typer.Argument(help="A worker's id, as `tandem status` shows it.")],
    plays: Annotated[str, typer.Argument(metavar="ROLE", help="prefill, decode or colocated.")],
    grpc: Annotated[str | None, typer.Option(help="The cluster's gRPC address; default: the one running here.")] = None,
    admin: Annotated[str | None, typer.Option(help="The cluster's admin address.")] = None,
) -> None:
    """Change a worker's role while it runs; it drops nothing that it holds."""
    from cli import admin as calls
    from cli.running import admin_address
    from cluster.reconcile import POOL_ROLES

    roles = {one.value: one for one in POOL_ROLES}
    if plays not in roles:
        raise InvalidRequestError(f"{plays} is no role of a worker; one of {', '.join(sorted(roles))}")
    typer.echo(calls.set_role(admin_address(grpc, admin), target, roles[plays]))
