"""`tandem up`: run a cluster in the foreground."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from cluster.main import Addresses
    from cluster.report import ClusterSnapshot
    from core.config import Config


def up(
    config: Annotated[str | None, typer.Option(help="A YAML file; every option here overrides it.")] = None,
    model: Annotated[str | None, typer.Option(help="A Hugging Face directory or Hub id. Default: the demo model.")] = None,
    prefill: Annotated[int | None, typer.Option(help="Prefill workers.")] = None,
    decode: Annotated[int | None, typer.Option(help="Decode workers.")] = None,
    colocated: Annotated[int | None, typer.Option(help="Workers that do both.")] = None,
    routers: Annotated[int | None, typer.Option(help="Routers, all at the same addresses.")] = None,
    launcher: Annotated[str | None, typer.Option(help="ray, or local for plain child processes.")] = None,
    grpc: Annotated[str | None, typer.Option(help="HOST:PORT of the gRPC front; port 0 picks a free one.")] = None,
    http: Annotated[str | None, typer.Option(help="HOST:PORT of the OpenAI-compatible front.")] = None,
    admin: Annotated[str | None, typer.Option(help="HOST:PORT for workers and operators.")] = None,
    redis: Annotated[str | None, typer.Option(help="URL of the Redis that holds the cluster-wide directory.")] = None,
    policy: Annotated[str | None, typer.Option(help="How requests are placed.")] = None,
    transport: Annotated[str | None, typer.Option(help="How KV moves: auto, shm, tcp, grpc, collective.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or auto.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
) -> None:
    """Start a cluster and keep it until Ctrl-C, SIGTERM or `tandem down`.

    Prints one line on standard output when requests can be served; everything else goes to standard error.
    """
    from core.config import load

    options = {
        "model.path": model,
        "model.dtype": dtype,
        "cluster.prefill": prefill,
        "cluster.decode": decode,
        "cluster.colocated": colocated,
        "cluster.routers": routers,
        "cluster.launcher": launcher,
        "cluster.admin": admin,
        "router.grpc": grpc,
        "router.http": http,
        "router.policy": policy,
        "transfer.transport": transport,
        "redis": redis,
        "log_level": log_level,
    }
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if colocated and prefill is None and decode is None:
        given.update({"cluster.prefill": 0, "cluster.decode": 0})  # --colocated N alone means nothing but these
    if sys.stderr.isatty() and not (config or log_level):
        given["log_level"] = "warning"  # a terminal shows progress instead
    _run(load(config, given))


def _run(config: Config) -> None:
    from core.config import prepare_grpc

    prepare_grpc()
    from cli.progress import StartProgress
    from cli.running import announced
    from cluster.main import up as run_cluster
    from core.telemetry import configure_logging

    progress = StartProgress(sys.stderr.isatty())
    configure_logging(config.log_level, "tandem")
    with contextlib.ExitStack() as while_ready, progress:

        def on_ready(addresses: Addresses) -> None:
            progress.stop()
            where = (addresses.grpc, addresses.http, addresses.admin)
            while_ready.enter_context(announced(*where, model=config.model.path))
            print("tandem ready grpc={} http={} admin={}".format(*where), flush=True)

        def on_change(snapshot: ClusterSnapshot) -> None:
            progress.show(snapshot)

        run_cluster(config, on_ready, on_change, progress.log_line)
