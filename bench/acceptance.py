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

import mtp_mlx
from mtp_mlx.sampling import choose_sampler

PROMPTS = Path(__file__).parent / "demo" / "heldout.json"


def main() -> None:
    options = _options()
    pair, tokenizer = mtp_mlx.load(options.model, options.drafter)
    prompts = json.loads(options.prompts.read_text())[: options.limit]
    figures = {}
    for depth in options.depth:
        runs = []
        for number, prompt in enumerate(prompts):
            sampler = choose_sampler(options.temp, 1.0, 0.0, 0, number)
            run = mtp_mlx.stream_generate(
                pair, tokenizer, prompt["text"], max_tokens=options.tokens, depth=depth, sampler=sampler
            )
            runs.append(list(run)[-1].stats)
        figures[depth] = _summary(runs)
        print(f"depth {depth}: {figures[depth]}", file=sys.stderr)
    settings = {
        "model": options.model,
        "prompts": len(prompts),
        "tokens": options.tokens,
        "temp": options.temp,
    }
    report.write({"settings": settings, "depths": figures}, options.out)


def _summary(runs: list[mtp_mlx.Stats]) -> dict[str, object]:
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


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--drafter", default="auto")
    parser.add_argument("--prompts", type=Path, default=PROMPTS)
    parser.add_argument("--limit", type=int, default=None, help="use only the first prompts")
    parser.add_argument("--depth", type=int, nargs="+", default=[4])
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--temp", type=float, default=0.0)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
