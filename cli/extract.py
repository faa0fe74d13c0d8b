"""`mtp-mlx extract`: the mtp head out of an original checkpoint, for a conversion that lost it."""

from pathlib import Path
from typing import Annotated

import typer

from mtp_mlx.cli.display import Notes, Transfer, size
from mtp_mlx.errors import RequestError
from mtp_mlx.extract import extract
from mtp_mlx.quantise import DRAFTER_BITS, Affine


def command(
    source: Annotated[str, typer.Argument(help="Folder or hub id of the original checkpoint, or the file with mtp.*.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="File to write, or the folder of the converted target.")
    ] = Path("model-mtp.safetensors"),
    bits: Annotated[str, typer.Option(help="Quantise the head: 4 or 8; 'none' keeps it as it is.")] = "none",
    group_size: Annotated[
        int | None, typer.Option(help="Weights that share a scale where --bits is given; default 64.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there already.")] = False,
) -> None:
    """Get the mtp head that a converted model lost: only its bytes are read of the original, on the hub or on disk.

    Interrupted, it continues where it ended. Example: mtp-mlx extract org/original -o ./original-4bit
    """
    how = parse_drafter_bits("--bits", bits, group_size)
    with Notes(verbose=False) as notes, Transfer("reading the head") as progress:
        done = extract(source, output, how=how, force=force, progress=progress)
        notes.show()
    typer.echo(
        f"{done.file}: {done.tensors} tensors, {size(done.nbytes)}; the original's weights are {size(done.original)}"
    )
    if done.found_beside:
        typer.echo(f"The target beside it finds it by itself: mtp-mlx generate --model {done.file.parent}")
    else:
        typer.echo(f"Use it with its target: mtp-mlx generate --model TARGET --drafter {done.file}")


def parse_drafter_bits(option: str, bits: str, group_size: int | None) -> Affine | None:
    """How to quantise a drafter, None for 'none'. Raises RequestError for anything that cannot be done."""
    if bits == "none":
        if group_size is not None:
            raise RequestError(f"--group-size {group_size} needs {option}; without it nothing is quantised")
        return None
    if bits not in map(str, DRAFTER_BITS):
        raise RequestError(f"{option} {bits} is not one of {', '.join(map(str, DRAFTER_BITS))}, none")
    return Affine(int(bits), 64 if group_size is None else group_size)
