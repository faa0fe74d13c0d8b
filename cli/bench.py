"""`mtp-mlx bench`: what drafting is worth on this machine, as a table, a picture and a file to share."""

import json
import tempfile
from html import escape
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mtp_mlx.bench import AUTO, PEER, PLAIN, Comparison, Plan, machine, measure, precision, prompts
from mtp_mlx.cli.display import Notes, note
from mtp_mlx.cli.options import Drafter, DrafterBits, Model, Parts
from mtp_mlx.errors import RequestError
from mtp_mlx.hub import DEMO, find

REPEATS = 3


def command(
    model: Model = DEMO,
    drafter: Drafter = "auto",
    drafter_bits: DrafterBits = "auto",
    tokens: Annotated[int, typer.Option(help="Tokens of each text at most.")] = 128,
    repeats: Annotated[int, typer.Option(help="Counted repeats; the figures are medians.")] = REPEATS,
    quick: Annotated[bool, typer.Option("--quick", help="One repeat of two prompts at one depth.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for bench.json and bench.svg.")] = Path("mtp-mlx-bench"),
) -> None:
    """Measure every depth beside plain decoding and mlx-lm, in turn and on the same prompts.

    Example: mtp-mlx bench --model google/gemma-4-E4B-it --out results
    """
    _check(tokens, repeats, quick, out)
    with Notes(verbose=False) as notes:
        loaded = Parts(model, drafter, drafter_bits=drafter_bits).load()
        note(f"drafter: {loaded.drafter or 'none'} ({loaded.drafter_reason})")
        notes.show()
        texts = list(prompts(loaded.tokenizer).values())
        plan = Plan(texts[:2], [2], tokens, 1) if quick else Plan(texts, [1, 2, 3, 4], tokens, repeats)
        found = measure(loaded.pair, loaded.tokenizer, find(model), plan, note)
    settings = {
        "model": loaded.target,
        "drafter": loaded.drafter,
        "precision": str(precision(loaded.pair.target)),
        "tokens": plan.tokens,
        "repeats": plan.repeats,
        "prompts": len(plan.prompts),
    }
    content = {"machine": machine(), "settings": settings, **found.figures()}
    (out / "bench.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (out / "bench.svg").write_text(picture(found, f"{loaded.target}: tokens per second"), encoding="utf-8")
    _show(found)
    note(f"figures in {out / 'bench.json'}, picture in {out / 'bench.svg'}")


def _check(tokens: int, repeats: int, quick: bool, out: Path) -> None:
    """Raises RequestError for what could only fail after minutes of measuring."""
    if tokens < 2:
        raise RequestError(f"--tokens {tokens} leaves nothing to time; give at least 2, better 128")
    if repeats < 1:
        raise RequestError(f"--repeats {repeats} must be at least 1")
    if quick and repeats != REPEATS:
        raise RequestError(f"--quick means one repeat, and --repeats {repeats} is given too; leave one out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise RequestError(f"nothing can be written to the folder --out {out}: {error.strerror}") from error


def _show(found: Comparison) -> None:
    """The table and the verdict, on stdout."""
    table = Table("", "tok/s", f"to {found.base.arm}", "tokens per round", "first token", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, result in found.results.items():
        table.add_row(
            f"{name} ({result.depth})" if name == AUTO else name,
            f"{result.speed:.1f}",
            f"{found.ratio(result):.2f}x",
            f"{result.tokens_per_round:.2f}",
            f"{result.ttft_seconds:.3f} s",
        )
    console = Console(highlight=False)
    console.print(table)
    console.print()
    others = [f"{name} wrote another text than {PLAIN}" for name in found.strangers()]
    for line in (*found.notes, *others, found.verdict()):
        console.print(line, markup=False, soft_wrap=True)


def picture(found: Comparison, title: str) -> str:
    """Bars of tokens per second, as an SVG file."""
    most = max(result.speed for result in found.results.values())
    size = f'width="640" height="{60 + 30 * len(found.results)}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="14">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="20" y="28" font-weight="bold">{escape(title)}</text>',
    ]
    for i, (name, result) in enumerate(found.results.items()):
        y, width = 48 + 30 * i, 400 * result.speed / most
        colour = "#999999" if name in (PEER, PLAIN) else "#2a7f62"
        lines += [
            f'<text x="110" y="{y + 15}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="120" y="{y}" width="{width:.1f}" height="20" fill="{colour}"/>',
            f'<text x="{128 + width:.1f}" y="{y + 15}">{result.speed:.1f} ({found.ratio(result):.2f}x)</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])
