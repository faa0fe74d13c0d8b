"""`mtp-mlx`: the commands, and the one place where an error becomes a line and an exit code."""

import logging
import sys
import tempfile
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from mtp_mlx.cli import bench, chat, convert, doctor, extract, generate, inspect, models, pull, serve, verify
from mtp_mlx.errors import MTPError

app = typer.Typer(
    name="mtp-mlx",
    help="Lossless multi-token prediction on MLX: a small drafter guesses ahead, the model keeps what is right.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command(name="generate")(generate.command)
app.command(name="chat")(chat.command)
app.command(name="serve")(serve.command)
app.command(name="inspect")(inspect.command)
app.command(name="bench")(bench.command)
app.command(name="verify")(verify.command)
app.command(name="extract")(extract.command)
app.command(name="convert")(convert.command)
app.command(name="doctor")(doctor.command)
app.command(name="pull")(pull.command)
app.command(name="models")(models.command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mtp-mlx {version('mtp-mlx')}")
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Options that come before a command."""


def main() -> None:
    """Run a command. Exit codes: 0 done, 1 an error the user can act on, 2 wrong usage, 70 a fault of ours."""
    if sys.stdout is None:
        _fail("standard output is closed; there is nowhere to write the text", 1)
    # It reports each attempt at a connection; what fails in the end is an error of ours.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        app()
    except MTPError as error:
        _fail(str(error), 1)
    except BrokenPipeError:
        # The reader of a pipe has gone; there is nobody left to tell.
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:
        _fail(f"{error.strerror or error}", 1)
    except Exception as error:
        with tempfile.NamedTemporaryFile("w", prefix="mtp-mlx-", suffix=".log", delete=False) as log:
            traceback.print_exc(file=log)
        _fail(f"a fault in mtp-mlx: {type(error).__name__}: {error}; please report it with {Path(log.name)}", 70)


def _fail(message: str, code: int) -> None:
    one_line = " ".join(message.split())
    typer.echo(f"mtp-mlx: {one_line}", err=True)
    sys.exit(code)
