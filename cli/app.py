"""The typer application and the one place where errors become a line and an exit status."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tandem.errors import InvalidRequestError, TandemError, UnavailableError

FAILED, USAGE, UNREACHABLE, INTERRUPTED = 1, 2, 3, 130
_traceback = False


class _OneLineErrors(TyperGroup):
    """A user sees what to change, never a stack trace (unless asked for with `tandem --traceback`)."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except TandemError as error:
            if _traceback:
                raise
            sys.stderr.write(f"tandem: {error.message}\n")
            raise typer.Exit(_status(error)) from None
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:  # `tandem status | head`
            sys.stderr.close()
            raise typer.Exit(FAILED) from None
        except Exception as error:
            if _traceback or isinstance(error, typer.Abort) or hasattr(error, "exit_code"):  # typer's own: usage, exit
                raise
            sys.stderr.write(
                f"tandem: a mistake of ours: {type(error).__name__}: {error}\n"
                f"        `tandem --traceback {ctx.invoked_subcommand or ''}…` shows where; please report it\n"
            )
            raise typer.Exit(FAILED) from None


def _status(error: TandemError) -> int:
    if isinstance(error, UnavailableError):
        return UNREACHABLE
    return USAGE if isinstance(error, InvalidRequestError) or error.code == "config" else FAILED


app = typer.Typer(
    cls=_OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Serve large language models with prefill and decode on separate workers.",
    epilog="Exit status: 0 done, 1 failed, 2 something to change in what was asked or configured, 3 nobody answers.",
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"tandem {version('tandem')}")
        raise typer.Exit


@app.callback()
def main(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    global _traceback
    _traceback = traceback
