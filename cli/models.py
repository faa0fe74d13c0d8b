"""`mtp-mlx models`: what can be run from the local cache, and what else is known."""

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer
from huggingface_hub import constants

from mtp_mlx.cli.display import Notes, size
from mtp_mlx.hub import DEMOS
from mtp_mlx.inventory import Model, models
from mtp_mlx.pairs import registry


def known_pairs() -> Mapping[str, tuple[str, ...]]:
    """Released target -> its drafters: the head in itself, or repositories; those are also for its conversions."""
    return {
        family.original: ("the head in itself",) * family.carries_head + family.drafters(trained_quantised=False)
        for family in registry().families
    }


def command(
    everything: Annotated[
        bool, typer.Option("--all", help="List the pairs of target and drafter that are known, here or not.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object in place of the lines.")] = False,
) -> None:
    """List the models in the local cache of the hub that can be run, their drafters, and the demos.

    Example: mtp-mlx models --all
    """
    with Notes(verbose=False):
        found = models()
    if as_json:
        typer.echo(json.dumps(_figures(found, everything)))
        return
    for line in _lines(found, everything):
        typer.echo(line)


def _figures(found: list[Model], everything: bool) -> dict[str, Any]:
    listed = [vars(model) | {"folder": str(model.folder), "complete": not model.missing} for model in found]
    figures: dict[str, Any] = {"cache": constants.HF_HUB_CACHE, "models": listed, "demos": list(DEMOS)}
    return figures | ({"pairs": {target: list(names) for target, names in known_pairs().items()}} if everything else {})


def _lines(found: list[Model], everything: bool) -> Iterator[str]:
    width = max(len(name) for name in [*DEMOS, *(model.name for model in found)])
    if not found:
        yield f"nothing that can be run is in {constants.HF_HUB_CACHE}; fetch a model with mtp-mlx pull NAME"
    for model in found:
        yield f"{model.name:<{width}}  {model.role:<7}  {size(model.nbytes):>9}  {_state(model)}"
    for name in DEMOS:
        yield f"{name:<{width}}  target   built in   complete; drafter: built in"
    for target, drafters in known_pairs().items() if everything else ():
        yield f"{target} with {' or '.join(drafters)}"


def _state(model: Model) -> str:
    if model.missing:
        more = f" and {len(model.missing) - 1} more" if len(model.missing) > 1 else ""
        return f"lacks {model.missing[0]}{more}; mtp-mlx pull {model.name}"
    if model.role == "drafter":
        return "complete"
    if model.drafter is None:
        return f"complete; no drafter: {model.drafter_reason}"
    return f"complete; drafter: {model.drafter} ({model.drafter_reason})"
