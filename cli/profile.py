"""`tandem profile`: measure what steps and transfers cost on this machine, and write it down as a cost model."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from core.config import Config
    from core.cost_model import CostModel


def profile(
    as_json: Annotated[str, typer.Option("--json", metavar="FILE", help="Where the cost model is written.")],
    config: Annotated[str | None, typer.Option(help="The YAML file of `tandem up`: measure what it would serve.")] = None,
    model: Annotated[str | None, typer.Option(help="A Hugging Face directory or Hub id. Default: the demo model.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or auto.")] = None,
    from_gpu: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Fit a public GPU profile (Splitwise, DistServe, Dynamo, Helix) instead."),
    ] = None,
    select: Annotated[
        str, typer.Option(metavar="KEY=VALUE,…", help="Which of the profile's configurations, as in hardware=h100-80gb.")
    ] = "",
) -> None:
    """Measure the model's steps (prompts by new tokens and context, streams by batch and context) and this machine's links.

    A worker's engine is driven as it is when it serves; stop a cluster that runs here first, or its load is measured too.
    """
    from cli.written import check_writable
    from core.config import load
    from core.cost_file import write_cost_model

    check_writable(as_json)

    if from_gpu is not None:
        made = _from_gpu(from_gpu, select)
    else:
        options = {"model.path": model, "model.dtype": dtype}
        made = _measure(load(config, {name: value for name, value in options.items() if value is not None}))
    write_cost_model(made, as_json)
    _show(made, as_json)


def _from_gpu(path: str, select: str) -> CostModel:
    from core.gpu_profile import read_gpu_profile
    from tandem.errors import InvalidRequestError

    wanted = dict(part.partition("=")[::2] for part in select.split(",") if part)
    if not all(wanted.values()):
        raise InvalidRequestError(f"--select must look like model=llama2-70b,hardware=h100-80gb, got {select!r}")
    return read_gpu_profile(path, wanted)


def _measure(config: Config) -> CostModel:
    from core.config import pin_threads, prepare_grpc

    pin_threads(config.engine.threads)
    prepare_grpc()
    import asyncio
    import os

    from rich.progress import MofNCompleteColumn, TimeRemainingColumn

    from cli.progress import Bar
    from core.cost_fit import fit_steps, heldout_errors
    from core.cost_model import CostModel
    from core.hostspec import HostSpec
    from core.request import WorkerRole
    from worker.node import build_node
    from worker.profile_links import NAMES, counts_of, measure_links
    from worker.profile_steps import ROUNDS, StepMeter, measured, points_of

    with Bar(sys.stderr.isatty(), MofNCompleteColumn(), TimeRemainingColumn()) as bar:
        spec = HostSpec(f"profile-{os.getpid()}", WorkerRole.COLOCATED, 1, config, "")
        bar.begin(f"loading {config.model.path}", 1)
        node = build_node(spec, lambda share, detail: None)
        try:
            points = points_of(node, config.engine)
            bar.begin("steps", len(points) * (ROUNDS + 1))
            steps = measured(StepMeter(node, config.engine), points, bar.advance)
            layout = node.layout
        finally:
            node.close()
        bar.begin("links", len(NAMES) * len(counts_of(layout)))
        links = asyncio.run(measure_links(layout, config.transfer.shm_dir, bar.advance, _say))
    fit, (heldout_median, heldout_p90) = fit_steps(steps), heldout_errors(steps)
    return CostModel(
        steps=fit.cost,
        kv_token_bytes=layout.token_bytes,
        links=links,
        fingerprint=layout.fingerprint.hex(),
        machine=_machine(config.engine.threads),
        samples=fit.samples,
        median_error=fit.median_error,
        p90_error=fit.p90_error,
        heldout_median_error=heldout_median,
        heldout_p90_error=heldout_p90,
    )


def _machine(threads: int) -> str:
    import os
    import platform
    from pathlib import Path

    named = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    cpu = named[0].partition(":")[2].strip() if named else platform.processor() or platform.machine()
    return f"{cpu}, {os.cpu_count()} cores, {threads} thread{'s' if threads > 1 else ''} per worker"


def _say(line: str) -> None:
    sys.stderr.write(f"tandem: {line}\n")


def _show(model: CostModel, path: str) -> None:
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"what a step costs · {model.machine}", title_justify="left")
    table.add_column("term")
    table.add_column("microseconds", justify="right")
    labels = {
        "base_s": "a step",
        "prefill_token_s": "a prompt token",
        "prefill_pair_s": "a pair of a prompt token and one before it",
        "decode_row_s": "a stream",
        "decode_context_s": "a token that a stream looks at",
    }
    for name, seconds in asdict(model.steps).items():
        table.add_row(labels[name], f"{seconds * 1e6:.4g}")
    for name, link in model.links.items():
        table.add_row(f"a transfer over {name}", f"{link.latency_s * 1e6:.0f}, then {link.bytes_per_s / 1e9:.2f} GB/s")
    console = Console()
    console.print(table)
    heldout = f"; on steps not fitted {model.heldout_median_error:.1%} and {model.heldout_p90_error:.1%}"
    console.print(
        f"{model.samples} steps, relative error {model.median_error:.1%} median, {model.p90_error:.1%} p90"
        f"{heldout if model.heldout_p90_error else ''} → {path}",
        highlight=False,
    )
