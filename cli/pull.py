"""`mtp-mlx pull`: bring a target and its drafter here, and say what came."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from mtp_mlx.checkpoint import Checkpoint
from mtp_mlx.cli.display import Notes, note, size
from mtp_mlx.errors import CheckpointError, MTPError
from mtp_mlx.hub import UnreachableError, download, held_instead, local
from mtp_mlx.loading import open_target, role
from mtp_mlx.pairs import choose


@dataclass(frozen=True)
class Part:
    """A target or a drafter that is here now."""

    role: str
    name: str
    folder: Path
    fetched: int  # bytes that came, or 0 where all were here
    files: int  # that came
    nbytes: int  # of all its files; 0 for what was not downloaded

    def __str__(self) -> str:
        if not self.nbytes:
            return f"{self.role} {self.name}: on this machine, nothing to fetch"
        came = f"{self.files} files, {size(self.fetched)} fetched" if self.files else "already here"
        return f"{self.role} {self.name}: {came}, {size(self.nbytes)} in {self.folder}"


def command(
    name: Annotated[str, typer.Argument(help="Hub id of the target, or of a drafter alone.", metavar="NAME")],
    drafter: Annotated[
        str, typer.Option(help="Hub id of the drafter, 'auto' for the one that belongs to the target, or 'none'.")
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object in place of the lines.")] = False,
) -> None:
    """Download the newest version of a model and of its drafter, so that they run offline from then on.

    Only what is read is fetched: configuration, tokenizer and safetensors. Files that are here are kept, so a download
    that was interrupted goes on with the files that are missing. They go to the cache of the hub, which other programs
    share; the variable HF_HOME moves it.

    Example: mtp-mlx pull google/gemma-4-E4B-it
    """
    with Notes(verbose=False):
        try:
            parts, reason = _pull(name, drafter)
        except KeyboardInterrupt:
            note(f"interrupted; `mtp-mlx pull {name}` goes on with the files that are missing")
            raise
    if as_json:
        typer.echo(
            json.dumps({"parts": [vars(part) | {"folder": str(part.folder)} for part in parts], "drafter": reason})
        )
        return
    for part in parts:
        typer.echo(part)
    typer.echo(f"drafter: {reason}")


def _pull(name: str, drafter: str) -> tuple[list[Part], str]:
    """The parts that are here then, and why this drafter or none."""
    target = _part("model", name)
    if role(Checkpoint.open(target.folder).model_type) == "drafter":
        return [target], f"{name} is one itself"
    choice = choose(name, open_target(target.folder), drafter)
    failures: list[str] = []
    for chosen in choice.drafters:
        try:
            return [target, _part("drafter", chosen)], choice.reason
        except MTPError as error:
            failures.append(str(error))
    if failures:
        raise CheckpointError(
            f"{name} is here, its drafter ({choice.reason}) is not: {'; '.join(failures)}; --drafter none does without"
        )
    return [target], choice.reason


def _part(kind: str, name: str) -> Part:
    place = local(name)
    if place is not None and not place.exists():
        raise CheckpointError(f"{name} is neither a folder or file here nor a hub id; give one of them")
    if place is not None:
        return Part(kind, name, place, 0, 0, 0)
    accept = _accept_target if kind == "model" else Checkpoint.open
    try:
        came = download(name, accept)
    except UnreachableError as error:
        folder = held_instead(name, error)
        note(f"{error}; what is here of {name} is complete")
        return Part(kind, name, folder, 0, 0, sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
    return Part(kind, name, came.folder, sum(came.new.values()), len(came.new), came.nbytes)


def _accept_target(folder: Path) -> None:
    """Raises CheckpointError for what is neither a target nor a drafter."""
    if role(Checkpoint.open(folder).model_type) != "drafter":
        open_target(folder)
