"""`mtp-mlx inspect`: what a checkpoint is, which drafter it gets and what both take, before anything is loaded."""

import json
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mtp_mlx.cli.display import Notes, size
from mtp_mlx.cli.options import Drafter, KvBits, parse_kv_bits
from mtp_mlx.forecast import ACCEPTANCE
from mtp_mlx.outline import CONTEXTS, Outline, outline


def command(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a target or a drafter, or a demo.")],
    more: Annotated[list[int] | None, typer.Argument(hidden=True, help="Further contexts.")] = None,
    drafter: Drafter = "auto",
    context: Annotated[
        list[int] | None,
        typer.Option(
            help="Tokens of a text whose memory is told; several may follow each other. Default: 4096 32768 131072."
        ),
    ] = None,
    kv_bits: KvBits = "none",
    acceptance: Annotated[
        float, typer.Option(help="How often a draft is right, for the estimate of depth.")
    ] = ACCEPTANCE,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object; sizes in bytes.")] = False,
) -> None:
    """Tell what a model is and what it takes, from its config and headers; nothing is loaded or downloaded whole.

    Example: mtp-mlx inspect mlx-community/gemma-4-12B-it-4bit --context 8192 65536 --kv-bits 8
    """
    bits = parse_kv_bits(kv_bits)
    with Notes(verbose=False), Console(stderr=True).status(escape(f"reading what {model} says of itself")):
        found = outline(model, drafter, [*(context or ()), *(more or ())] or CONTEXTS, bits, acceptance)
    if as_json:
        typer.echo(json.dumps(found.figures(), indent=1))
    else:
        _show(found)


def _show(found: Outline) -> None:
    console = Console(highlight=False)
    for name, value in _rows(found):
        console.print(f"{name:14}{value}", markup=False, soft_wrap=True)
    console.print(_memory(found))
    for line in _notes(found):
        console.print(line, markup=False, soft_wrap=True)


def _rows(found: Outline) -> Iterator[tuple[str, str]]:
    weights = found.weights
    layers = ", ".join(f"{count} {kind}" for kind, count in found.layers.items())
    yield "model", f"{found.name}: a {found.role} of type {found.model_type} (from {found.source})"
    yield "layers", f"{sum(found.layers.values())}: {layers}; {found.kept} keep something of a text"
    mixture = f"; {weights.chosen} of {weights.experts} experts at a time" if weights.experts else ""
    yield "parameters", f"{_count(weights.parameters)}, {_count(weights.active)} of them active for a token{mixture}"
    yield "weights", f"{size(weights.nbytes)} in {found.precision}, quantisation: {found.quantization}"
    if found.role == "target":
        yield "drafter", f"{found.drafter or 'none'} ({found.drafter_reason})"
    if found.drafter_weights is not None:
        yield "", f"{_count(found.drafter_weights.parameters)} parameters, {size(found.drafter_weights.nbytes)}"
    limit = f"trained for {found.context} tokens" if found.context else "of unknown length"
    yield "context", limit
    yield "this machine", f"{size(found.machine)} of memory that MLX may use"


def _memory(found: Outline) -> Table:
    kept = "as computed" if found.kv_bits is None else f"at {found.kv_bits} bits"
    table = Table("tokens", f"cache {kept}", "in all", "", "read per token", "per draft step", box=None, pad_edge=False)
    for column in table.columns:
        column.justify = "right"
    for entry in found.contexts:
        fits = "fits" if entry.fits else "too much"
        draft = "-" if entry.draft_read is None else size(entry.draft_read)
        table.add_row(str(entry.tokens), size(entry.cache), size(entry.total), fits, size(entry.plain_read), draft)
    return table


def _notes(found: Outline) -> Iterator[str]:
    yield "In all: weights, drafter and cache. What a chunk of a prompt needs while it is read comes on top."
    longest = found.contexts[-1].tokens
    if found.context and longest > found.context:
        yield f"The model was not made for {longest} tokens."
    if not found.estimates:
        return
    told = [f"{_mark(found, e.chip.name)} {e.depth} ({e.speedup:.1f}x)" for e in found.estimates]
    yield (
        f"Estimate, not measured: the best depth after {found.contexts[0].tokens} tokens if {found.acceptance:.0%} of "
        "drafts are right, from published costs: "
        f"{', '.join(told)}. `mtp-mlx bench` measures this machine."
    )


def _mark(found: Outline, chip: str) -> str:
    return f"{chip} (like this machine)" if chip == found.here else chip


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"
