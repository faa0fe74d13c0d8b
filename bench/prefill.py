"""Seconds to read a prompt: with and without a drafter, with buffers that fit and with mostly empty ones.

    python bench/prefill.py [--model demo] [--tokens 1200] [--step 256] [--repeats 5] [--out figures.json]

The arms run one after the other in every repeat; medians, and ratios to the first arm. The first repeat is not counted.
"""

import argparse
import statistics
import time
from pathlib import Path

import report

import mtp_mlx
from mtp_mlx.generation import encode
from mtp_mlx.ngram import NOBODY
from mtp_mlx.sequence import Sequence
from mtp_mlx.types import Pair

TEXT = Path(__file__).read_text()


def main() -> None:
    options = _options()
    loaded, tokenizer = mtp_mlx.load(options.model)
    pair = loaded.pair
    prompt = (encode(tokenizer, TEXT) * (options.tokens // 100))[: options.tokens]
    arms = {
        "plain": (Pair(pair.target, NOBODY), len(prompt)),
        "with drafter": (pair, len(prompt)),
        "buffers 32 times too large": (pair, 32 * len(prompt)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(options.repeats + 1):
        for name, (parts, room) in arms.items():
            sequence = Sequence(parts, mtp_mlx.Rules())
            sequence.cache.reserve(room)
            began = time.perf_counter()
            sequence.prefill(prompt, options.step, lambda done, total: None)
            sequence.round(0)
            if repeat:
                seconds[name].append(time.perf_counter() - began)
    base = statistics.median(seconds["plain"])
    figures = {
        name: {
            "seconds": round(statistics.median(values), 4),
            "against_plain": round(statistics.median(values) / base, 3),
            "all": [round(value, 4) for value in values],
        }
        for name, values in seconds.items()
    }
    settings = {"model": options.model, "tokens": len(prompt), "step": options.step}
    report.write({"settings": settings, "arms": figures}, options.out)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tokens", type=int, default=1200)
    parser.add_argument("--step", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
