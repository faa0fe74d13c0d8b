"""`mtp-mlx convert`: an original checkpoint as an MLX one, with its drafter."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from mtp_mlx.cli.display import Notes, size
from mtp_mlx.cli.options import parse_dtype
from mtp_mlx.convert import Converted, Precision, convert
from mtp_mlx.errors import RequestError


def command(
    source: Annotated[str, typer.Argument(help="Folder or hub id of the original checkpoint, in bfloat16 or float16.")],
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
    bits: Annotated[
        str | None, typer.Option(help="Bits of a weight, 4 or 8 for example; 'none' does not quantise. Default: 4.")
    ] = None,
    group_size: Annotated[int | None, typer.Option(help="Weights that share a scale; default: 64.")] = None,
    mode: Annotated[str, typer.Option(help="Kind of quantisation: affine, mxfp4, mxfp8 or nvfp4.")] = "affine",
    recipe: Annotated[
        str | None, typer.Option(help="More bits where they count: mixed_2_6, mixed_3_4, mixed_3_6 or mixed_4_6.")
    ] = None,
    drafter: Annotated[
        str,
        typer.Option(help="Folder, file or hub id of the drafter, 'auto' for the one that belongs to it, or 'none'."),
    ] = "auto",
    drafter_bits: Annotated[
        str, typer.Option(help="Bits of the drafter's weights: 4, 8 or 'none'; 'auto' goes with the target.")
    ] = "auto",
    dtype: Annotated[
        str, typer.Option(help="Recast what is not quantised: float32, bfloat16 or float16; 'auto' keeps it.")
    ] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace a model folder that is there already.")] = False,
) -> None:
    """Convert a checkpoint to MLX and keep its drafter: the folder works here as a pair, and in mlx-lm as a model.

    Interrupted, it keeps what it has downloaded and finished. Example: mtp-mlx convert org/original ./original-4bit
    """
    precision = Precision.choose(parse_bits(bits), group_size, mode, recipe, parse_dtype(dtype))
    status = Console(stderr=True).status("")

    def say(doing: str) -> None:
        status.update(escape(doing))
        status.start()  # not earlier: a download has bars of its own

    try:
        with Notes(verbose=False):
            done = convert(source, output, precision, drafter=drafter, drafter_bits=drafter_bits, force=force, say=say)
    finally:
        status.stop()
    _show(done)


def parse_bits(bits: str | None) -> int | str | None:
    """A number, 'none', or None for what is usual. Raises RequestError for anything else."""
    if bits is None or bits == "none":
        return bits
    if not bits.isdecimal():
        raise RequestError(f"--bits {bits} is neither a number nor 'none'")
    return int(bits)


def _show(done: Converted) -> None:
    typer.echo(
        f"{done.folder}: target {size(done.target)}, {done.bits_per_weight:.2f} bits per weight; "
        f"the original's weights are {size(done.before)}"
    )
    if done.drafter is None:
        typer.echo(f"no drafter: {done.drafter_reason}")
    else:
        typer.echo(f"drafter: {size(done.drafter)} ({done.drafter_reason})")
    typer.echo(f"Try it: mtp-mlx generate --model {done.folder}")
