"""Tokens per second of B texts in one batch against the same texts one after the other, with and without drafts.

    python bench/batch.py [--model demo] [--rows 1 2 4 8] [--depth auto] [--tokens 128] [--repeats 5]

One repeat runs every arm once, in turn; the first is not counted. An arm is a number of texts, together or in turn, at
depth 0 or at `--depth`; prompts are read and first tokens written before the clock starts. `gain` is together over in
turn at the same depth, `against plain` the same over plain decoding in turn: what B times a single text brings without
batches and without drafts is 1. Texts end where they end by themselves, so that batches shrink towards the end.
"""

import argparse
import time
from collections.abc import Iterator
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import report
from mlx_lm.tokenizer_utils import TokenizerWrapper

import mtp_mlx
from mtp_mlx.cli.options import DTYPES
from mtp_mlx.generation import Generation, Progress, Writing, encode, generation, wired
from mtp_mlx.model import pair_of
from mtp_mlx.options import Options
from mtp_mlx.prefixes import Prefixes
from mtp_mlx.sampling import Sample
from mtp_mlx.together import Pace, Together
from mtp_mlx.types import Pair


class Always(Pace):
    """Texts are written together, or in turn, whatever is measured."""

    def __init__(self, wanted: bool):
        super().__init__()
        self._wanted = wanted

    def together(self, texts: int) -> bool:
        return self._wanted


class Arm(NamedTuple):
    rows: int
    together: bool
    depth: int | str


class Figures(NamedTuple):
    tokens: int
    seconds: float
    rounds: int

    @property
    def tps(self) -> float:
        return self.tokens / self.seconds


def main() -> None:
    options = _options()
    model, tokenizer = mtp_mlx.load(options.model, drafter=options.drafter, dtype=DTYPES[options.dtype])
    pair = pair_of(model)
    prompts = [encode(tokenizer, entry["text"]) for entry in report.prompts(report.HELDOUT, max(options.rows))]
    arms = [
        Arm(rows, together, depth)
        for rows in options.rows
        for together in (True, False)
        for depth in (0, options.depth)
    ]
    run = partial(_run, pair, tokenizer, prompts, options)
    found: dict[Arm, list[Figures]] = {arm: [] for arm in arms}
    for repeat in range(options.repeats + 1):
        for arm in arms:
            figures = run(arm)
            if repeat:
                found[arm].append(figures)
        report.say(f"repeat {repeat} of {options.repeats}")
    tps = {arm: median(figures.tps for figures in found[arm]) for arm in arms}
    rows = [_row(rows, options.depth, tps, found) for rows in options.rows]
    settings = {
        name: vars(options)[name] for name in ("model", "drafter", "dtype", "depth", "tokens", "temp", "repeats")
    }
    report.write({"settings": settings, "rows": rows}, options.out)


def _row(rows: int, depth: int | str, tps: dict[Arm, float], found: dict[Arm, list[Figures]]) -> dict[str, Any]:
    plain = tps[Arm(rows, False, 0)]
    figures: dict[str, Any] = {"texts": rows}
    for name, at in (("plain", 0), ("mtp", depth)):
        together, turns = Arm(rows, True, at), Arm(rows, False, at)
        ratios = [one.tps / other.tps for one, other in zip(found[together], found[turns], strict=True)]
        figures[name] = {
            "together_tps": tps[together],
            "in_turn_tps": tps[turns],
            "gain": median(ratios),
            "gains": ratios,
            "against_plain": tps[together] / plain,
            "rounds": found[together][-1].rounds,
        }
    return figures


def _run(
    pair: Pair, tokenizer: TokenizerWrapper, prompts: list[list[int]], options: argparse.Namespace, arm: Arm
) -> Figures:
    sampler = Sample(options.temp) if options.temp else None
    wanted = Options(options.tokens, arm.depth, sampler, lookup=False)
    together = Together(pair, Always(arm.together))
    prefixes = Prefixes(pair, 0)
    texts = [generation(pair, tokenizer, prompt, wanted, prefixes) for prompt in prompts[: arm.rows]]
    with wired():
        live = {id(writing): (text, writing) for text, writing in map(_begun, texts)}
        tokens, rounds, began = 0, 0, time.perf_counter()
        while live:
            company = together.company([writing for _, writing in live.values()])
            rounds += 1
            for writing, turn in zip(company, together.round(company), strict=True):
                text, _ = live.pop(id(writing))
                tokens += sum(len(event) for event in _until_wanted(text, text.send(turn)))
                if not writing.finished:
                    live[id(writing)] = text, writing
        return Figures(tokens, time.perf_counter() - began, rounds)


def _begun(text: Generation) -> tuple[Generation, Writing]:
    """A text whose first token has been written."""
    event = next(text)
    while not isinstance(event, Writing):
        event = next(text)
    list(_until_wanted(text, text.send(event.round())))
    return text, event


def _until_wanted(text: Generation, event: Any) -> Iterator[list[Any]]:
    """The responses up to the next time that a round is wanted, or to the end."""
    while not isinstance(event, Writing):
        if not isinstance(event, Progress):
            yield event
        event = next(text, None)
        if event is None:
            return


def _options() -> argparse.Namespace:
    parser = report.parser(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--depth", type=lambda text: text if text == "auto" else int(text), default="auto")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--temp", type=float, default=0.0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
