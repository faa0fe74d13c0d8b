"""`mtp-mlx verify`: the proof, on this machine, that drafting changes nothing; the report on stdout."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from mlx_lm.tokenizer_utils import TokenizerWrapper
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mtp_mlx.cli.display import Notes, versions
from mtp_mlx.cli.options import Adapter, Drafter, DrafterBits, KvBits, Model, Parts, check_drawn, parse_depth
from mtp_mlx.conversation import in_chat_template
from mtp_mlx.errors import RequestError
from mtp_mlx.generation import encode
from mtp_mlx.hub import DEMO
from mtp_mlx.loading import Loaded
from mtp_mlx.sampling import check_seed, choose_sampler
from mtp_mlx.verify import Comparison, Fit, Numerics, Plan, Report, verify

DRAWN = 20  # texts' worth of tokens drawn at a temperature
PROMPTS = {
    "code": "class Tree:\n    def __init__(self):\n        self.root = None\n\n    def insert(self, key):\n",
    "prose": "The module provides functions to read and write files. Before a file is read,",
    "json": '{"planets": [{"name": "Mercury", "radius": 2440, "moons": 0}, {"name": "Venus",',
    "list": "Steps to release a new version of a library:\n\n1. Run the tests.\n2. Update the list of changes.\n3.",
    "copy": "Repeat this line three times: the quick brown fox jumps over the lazy dog\n"
    "the quick brown fox jumps over the lazy dog\nthe quick brown",
}


def command(
    model: Model = DEMO,
    drafter: Drafter = "auto",
    adapter: Adapter = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="File with one prompt on each line or, if it ends in .json, a list of strings."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of each text; 20 times as many are drawn.")] = Plan.tokens,
    depth: Annotated[
        list[str] | None, typer.Option(help="A depth to compare with plain decoding; may be given several times.")
    ] = None,
    temp: Annotated[float, typer.Option(help="Temperature of the tokens that are drawn; 0 leaves that out.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Draw from the smallest set with this probability; 1 is off.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Drop tokens below this share of the best one's; 0 is off.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from this many tokens; 0 is off.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the first drawn text.")] = 0,
    dtype: Annotated[
        str, typer.Option(help="Recast the weights; 'float32' rounds least and so shows the smallest faults.")
    ] = "auto",
    drafter_bits: DrafterBits = "auto",
    kv_bits: KvBits = "none",
    ignore_chat_template: Annotated[
        bool, typer.Option("--ignore-chat-template", help="Continue the prompts as plain text.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object in place of the report.")] = False,
) -> None:
    """Prove that drafting does not change the output here: texts with and without drafts, and what is drawn.

    Exits with 1 if anything differs by more than rounding explains. Example: mtp-mlx verify --depth 2 --depth auto
    """
    check_seed(seed)
    sampler = choose_sampler(temp, top_p, min_p, top_k)
    check_drawn(temp, top_p=(top_p, 1), min_p=(min_p, 0), top_k=(top_k, 0))
    depths = tuple(parse_depth(given) for given in depth) if depth else Plan.depths
    texts = PROMPTS if prompts is None else read_prompts(prompts)
    with Notes(verbose=False) as notes:
        loaded = Parts(model, drafter, dtype, drafter_bits, kv_bits, adapter).load()
        if loaded.drafter is None:
            raise RequestError(f"there is nothing to verify without a drafter ({loaded.drafter_reason})")
        notes.show()
        plan = Plan(
            _possible(depths, loaded.pair.drafter.limit, asked=bool(depth)),
            tokens,
            sampler if temp else None,
            DRAWN * tokens,
            seed,
        )
        ids = {name: _ids(loaded.tokenizer, text, ignore_chat_template) for name, text in texts.items()}
        with Console(stderr=True).status("") as status:
            report = verify(loaded.pair, loaded.tokenizer, ids, plan, lambda doing: status.update(escape(doing)))
    if as_json:
        _print_json(report, loaded)
    else:
        _show(report, loaded, temp)
    if report.verdict == "fault":
        raise typer.Exit(1)


def read_prompts(file: Path) -> dict[str, str]:
    """The prompts of a file by number. Raises RequestError for a file that holds none."""
    try:
        text = file.read_text(encoding="utf-8")
        found = json.loads(text) if file.suffix == ".json" else [line for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise RequestError(f"--prompts {file} cannot be read: {error}") from None
    if not isinstance(found, list) or not found or not all(isinstance(prompt, str) and prompt for prompt in found):
        raise RequestError(f"--prompts {file} holds no prompts; give one on each line, or a JSON list of strings")
    return {f"prompt {number + 1}": prompt for number, prompt in enumerate(found)}


def _possible(depths: tuple[int | str, ...], limit: int, *, asked: bool) -> tuple[int | str, ...]:
    """Depths that the user did not ask for give way to a drafter's limit."""
    if asked:
        return depths
    return tuple(dict.fromkeys(min(depth, limit) if isinstance(depth, int) else depth for depth in depths))


def _ids(tokenizer: TokenizerWrapper, text: str, ignore_chat_template: bool) -> list[int]:
    return encode(tokenizer, text if ignore_chat_template else in_chat_template(tokenizer, text))


def _show(report: Report, loaded: Loaded, temperature: float) -> None:
    console = Console(highlight=False)

    def say(line: str = "") -> None:
        console.print(line, markup=False, soft_wrap=True)

    say(f"{loaded.target} with {loaded.drafter}, {report.numerics.dtype}\n")
    for line in _rounding(report.numerics):
        say(line)
    say()
    console.print(_table(report, temperature))
    for comparison in report.comparisons:
        for line in _difference(comparison, report.numerics, loaded.tokenizer):
            say(line)
    say()
    for fit in report.fits:
        say(_fit(fit, temperature))
    for fault in report.faults():
        say(f"fault: {fault}")
    weakness = report.weakness()
    say("\n" + report.sentence() + (f" But {weakness}." if weakness else ""))


def _rounding(numerics: Numerics) -> Iterator[str]:
    yield "Rounding: how far a token's log-probability moves if a text is not read token by token but"
    for noise in (*numerics.blocks, numerics.prompt):
        how = "as a prompt" if noise.rows is None else f"{noise.rows} rows at a time"
        yield f"  {how:<17}{noise.largest:.2g} nats at most, {noise.mean:.2g} on average"


def _table(report: Report, temperature: float) -> Table:
    table = Table("prompt", "depth", "temp", "tokens", "per round", "accepted", "text", box=None, pad_edge=False)
    for column in table.columns[1:6]:
        column.justify = "right"
    for c in report.comparisons:
        verdict = c.verdict(report.numerics)
        table.add_row(
            c.prompt,
            str(c.depth),
            f"{temperature if c.drawn else 0:g}",
            str(c.tokens),
            f"{c.tokens_per_round:.2f}",
            f"{c.accepted} of {c.drafted}",
            "FAULT" if verdict == "fault" else verdict,
        )
    return table


def _difference(c: Comparison, numerics: Numerics, tokenizer: TokenizerWrapper) -> Iterator[str]:
    """Where a text leaves plain decoding's, and what rounding has to do with it."""
    if c.first is None:
        return
    plain, other = (_token(tokenizer, token) for token in (c.first.plain, c.first.other))
    if c.first.gap is None:
        judged = "of which rounding is no cause"
    elif c.drawn:
        judged = f"rounding alone parts texts of one seed by there in up to {c.first.chance:.2g} of all cases"
    else:
        judged = f"{c.first.gap:.2g} nats less probable, rounding explains {numerics.nearness:.2g}"
    yield f"{c.where}: token {c.first.place + 1} is {other} in place of {plain}; {judged}"


def _token(tokenizer: TokenizerWrapper, token: int | None) -> str:
    return "the end" if token is None else f"{tokenizer.decode([token])!r} ({token})"


def _fit(fit: Fit, temperature: float) -> str:
    judged = f"p = {fit.p_value:.2g}" if fit.classes else "too few or too certain to tell"
    return (
        f"Drawn at temperature {temperature:g}: {fit.tokens} tokens in {fit.texts} texts, {fit.tokens_per_round:.2f} "
        f"per round; against the target's distribution {judged}"
    )


def _print_json(report: Report, loaded: Loaded) -> None:
    answer = {
        **report.figures(),
        "model": loaded.target,
        "drafter": loaded.drafter,
        "adapter": loaded.adapter,
        "versions": versions(),
    }
    typer.echo(json.dumps(answer))
