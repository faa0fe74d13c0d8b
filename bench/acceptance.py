"""Tokens per round and acceptance per position on held-out prompts.

    python bench/acceptance.py --depth 4 [--model demo] [--tokens 200] [--temp 0.6] [--out figures.json]

The prompts of bench/demo/heldout.json come from files that the demo pair was not trained on. A round brings its
accepted drafts and one token of the target's own. Texts end at the end-of-text token or after --tokens tokens.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import report
from mlx_lm.tokenizer_utils import TokenizerWrapper

import mtp_mlx
from mtp_mlx.cli.generate import DTYPES
from mtp_mlx.sampling import choose_sampler

PROMPTS = Path(__file__).parent / "demo" / "heldout.json"


def main() -> None:
    options = parser().parse_args()
    pair, tokenizer = mtp_mlx.load(options.model, options.drafter, dtype=DTYPES[options.dtype])
    prompts = json.loads(options.prompts.read_text())[: options.limit]
    figures = {}
    for depth in options.depth:
        figures[depth] = summary([run(pair, tokenizer, prompts, i, depth, options) for i in range(len(prompts))])
        print(f"depth {depth}: {figures[depth]}", file=sys.stderr)
    report.write({"settings": settings(options, prompts), "depths": figures}, options.out)


def run(
    pair: mtp_mlx.Pair,
    tokenizer: TokenizerWrapper,
    prompts: list[dict[str, str]],
    number: int,
    depth: int,
    options: argparse.Namespace,
) -> mtp_mlx.Stats:
    """The figures of one text; its number is the seed."""
    sampler = choose_sampler(options.temp, 1.0, 0.0, 0, number)
    text = prompts[number]["text"]
    responses = mtp_mlx.stream_generate(pair, tokenizer, text, max_tokens=options.tokens, depth=depth, sampler=sampler)
    return list(responses)[-1].stats


def settings(options: argparse.Namespace, prompts: list[dict[str, str]]) -> dict[str, object]:
    given = {name: vars(options)[name] for name in ("model", "dtype", "tokens", "temp")}
    return {**given, "prompts": len(prompts)}


def summary(runs: list[mtp_mlx.Stats]) -> dict[str, object]:
    tokens, rounds = sum(run.generation_tokens for run in runs), sum(run.rounds for run in runs)
    per_text = [run.tokens_per_round for run in runs]
    depth = max(len(run.reached_per_position) for run in runs)
    made = [sum(_at(run.reached_per_position, j) for run in runs) for j in range(depth)]
    kept = [sum(_at(run.accepted_at_position, j) for run in runs) for j in range(depth)]
    return {
        "tokens_per_round": round(tokens / rounds, 3),
        "mean_of_texts": round(statistics.mean(per_text), 3),
        "median_of_texts": round(statistics.median(per_text), 3),
        "lowest_and_highest_text": [round(min(per_text), 3), round(max(per_text), 3)],
        "accepted_per_position": [round(k / m, 3) for k, m in zip(kept, made, strict=True)],
        "tokens": tokens,
        "rounds": rounds,
    }


def _at(counts: tuple[int, ...], j: int) -> int:
    return counts[j] if j < len(counts) else 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--drafter", default="auto")
    parser.add_argument("--prompts", type=Path, default=PROMPTS)
    parser.add_argument("--limit", type=int, default=None, help="use only the first prompts")
    parser.add_argument("--depth", type=int, nargs="+", default=[4])
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--temp", type=float, default=0.0)
    parser.add_argument("--dtype", choices=DTYPES, default="auto")
    parser.add_argument("--out", type=Path)
    return parser


if __name__ == "__main__":
    main()
