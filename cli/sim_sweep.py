"""`python -m cli.sim_sweep`: random clusters under random faults, by seed (`make sim`)."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from cli.progress import Bar


def main(
    seed: Annotated[int, typer.Option(help="The first one.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="How many, one after another.")] = 200,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes; default: one per core.")] = None,
) -> None:
    """Plays the stories of so many seeds and says which break a rule, each as small as it could be made."""
    from rich.progress import MofNCompleteColumn, TimeRemainingColumn

    from sim.sweep import sweep

    logging.disable(logging.CRITICAL)  # routers log what goes wrong; here that is the plan
    wrong = 0
    with Bar(sys.stderr.isatty(), MofNCompleteColumn(), TimeRemainingColumn()) as bar:
        bar.begin("playing stories", count)
        for finding in sweep(seed, count, jobs):
            bar.advance()
            if finding is not None:
                wrong += 1
                typer.echo(str(finding))
    typer.echo(f"{count} stories from seed {seed} on: {wrong} broke a rule")
    if wrong:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
