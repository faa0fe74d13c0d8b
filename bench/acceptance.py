"""Tokens per round and acceptance per position on held-out prompts, by kind of text.

    python bench/acceptance.py --depth 4 [--model demo] [--tokens 200] [--temp 0 0.6 1.0] [--drafts coupled argmax]
        [--drafter-bits 4] [--out figures.json]

The prompts of bench/demo/heldout.json come from files that the demo pair was not trained on. A round brings its
accepted drafts and one token of the target's own. Texts end at the end-of-text token or after --tokens tokens.
`accepted_per_position` is the share of all drafts at a position, `accepted_if_reached` of those with every draft before
them right. --drafts compares ways of drafting at a temperature above 0: coupled, argmax, or sampled and then tested
by rejection; at temperature 0 they are one.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import report
from mlx_lm.tokenizer_utils import TokenizerWrapper

import mtp_mlx
from mtp_mlx import bench
from mtp_mlx.cli.options import DTYPES
from mtp_mlx.generation import encode

DRAFTS = ("coupled", "argmax", "sampled")


def main() -> None:
    options = parser().parse_args()
    loaded, tokenizer = mtp_mlx.load(
        options.model, drafter=options.drafter, dtype=DTYPES[options.dtype], drafter_bits=options.drafter_bits
    )
    pair = loaded.pair
    prompts = json.loads(options.prompts.read_text())[: options.limit]
    figures: dict[str, dict[str, Any]] = {}
    for depth in options.depth:
        for temperature in options.temp:
            for drafts in options.drafts if temperature else options.drafts[:1]:
                name = f"depth {depth}, temperature {temperature}" + f", {drafts}" * (temperature > 0)
                asked = (depth, options, temperature, drafts)
                texts = [run(pair, tokenizer, prompts, i, *asked) for i in range(len(prompts))]
                figures[name] = summary(texts) | {"kinds": _by_kind(prompts, texts)}
                report.say(f"{name}: {figures[name]}")
    report.write({"settings": settings(options, prompts), "runs": figures}, options.out)


def run(
    pair: mtp_mlx.Pair,
    tokenizer: TokenizerWrapper,
    prompts: list[dict[str, str]],
    number: int,
    depth: int,
    options: argparse.Namespace,
    temperature: float | None = None,
    drafts: str | None = None,
) -> bench.Text:
    """One text; its number is the seed. What is left out is the first that the options name."""
    temperature = options.temp[0] if temperature is None else temperature
    way: Any = drafts or options.drafts[0]
    if way == "sampled":
        way = mtp_mlx.Sample(temperature) if temperature else "coupled"
    arm = bench.ours(pair, tokenizer, depth, options.tokens, temperature, drafts=way)
    return arm.write(encode(tokenizer, prompts[number]["text"]), number)


def settings(options: argparse.Namespace, prompts: list[dict[str, str]]) -> dict[str, object]:
    names = ("model", "drafter", "drafter_bits", "dtype", "tokens", "temp", "drafts")
    return {**{name: vars(options)[name] for name in names}, "prompts": len(prompts)}


def summary(texts: Sequence[bench.Text]) -> dict[str, Any]:
    """The figures of several texts."""
    tokens, rounds = sum(len(text.tokens) for text in texts), sum(len(text.rounds) for text in texts)
    per_text = [len(text.tokens) / len(text.rounds) for text in texts]
    return {
        "tokens_per_round": round(tokens / rounds, 3),
        "mean_of_texts": round(statistics.mean(per_text), 3),
        "median_of_texts": round(statistics.median(per_text), 3),
        "lowest_and_highest_text": [round(min(per_text), 3), round(max(per_text), 3)],
        **bench.Acceptance.of(one for text in texts for one in text.rounds).figures(),
        "tokens": tokens,
        "rounds": rounds,
    }


def _by_kind(prompts: list[dict[str, str]], texts: list[bench.Text]) -> dict[str, dict[str, Any]]:
    """The same figures for every kind of text; a file that names none tells it by the endings of its sources."""
    kinds: dict[str, list[bench.Text]] = {}
    for prompt, text in zip(prompts, texts, strict=True):
        kind = prompt.get("kind") or Path(prompt.get("source", "")).suffix or "any"
        kinds.setdefault(kind, []).append(text)
    return {kind: summary(group) for kind, group in kinds.items()}


def parser() -> argparse.ArgumentParser:
    parser = report.parser(__doc__)
    parser.add_argument("--prompts", type=Path, default=report.HELDOUT)
    parser.add_argument("--limit", type=int, default=None, help="use only the first prompts")
    parser.add_argument("--drafter-bits", type=int, choices=(4, 8), default=None)
    parser.add_argument("--depth", type=int, nargs="+", default=[4])
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--temp", type=float, nargs="+", default=[0.0])
    parser.add_argument("--drafts", choices=DRAFTS, nargs="+", default=["coupled"])
    return parser


if __name__ == "__main__":
    main()
