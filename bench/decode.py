"""Tokens per second of every depth against plain decoding and mlx-lm, interleaved in one process.

    python bench/decode.py [--model demo] [--depth 1 2 3 4] [--tokens 256] [--repeats 7] [--temp 0] [--out figures.json]

One repeat runs every arm once over all prompts; the first is not counted. Tokens per second are the tokens that came
after the first round over the time from it to the last one; texts end where they end by themselves. `bound` is what
the costs of rounds, timed in the same run, allow: tau / (C(k+1)/C(1) + k d), with tau tokens per round and d a draft
step in plain steps; `reached` is the share of it that the speed-up over depth 0 is.

MLX's Linux wheel brings the reference BLAS, with which M rows cost M times one; another one is preloaded like this:

    LD_PRELOAD=/path/to/openblas/libblas.so.3 OPENBLAS_NUM_THREADS=2 python bench/decode.py --dtype float32
"""

import argparse
from pathlib import Path

import report

import mtp_mlx
from mtp_mlx import bench
from mtp_mlx.cli.options import DTYPES
from mtp_mlx.generation import encode
from mtp_mlx.hub import find


def main() -> None:
    options = _options()
    loaded, tokenizer = mtp_mlx.load(options.model, drafter=options.drafter, dtype=DTYPES[options.dtype])
    pair = loaded.pair
    prompts = [encode(tokenizer, entry["text"]) for entry in report.prompts(options.prompts, options.limit)]
    plan = bench.Plan(prompts, options.depth, options.tokens, options.repeats, options.temp)
    found = bench.measure(pair, tokenizer, find(options.model), plan, report.say)
    settings = {name: vars(options)[name] for name in ("model", "drafter", "dtype", "tokens", "temp", "repeats")}
    settings |= {"prompts": len(prompts), "precision": str(bench.precision(pair.target))}
    weights = {"target": pair.target.nbytes, "drafter": pair.drafter.nbytes}
    report.write({"settings": settings, "weight_bytes": weights, **found.figures()}, options.out)
    report.say(found.verdict())


def _options() -> argparse.Namespace:
    parser = report.parser(__doc__)
    parser.add_argument("--prompts", type=Path, default=report.HELDOUT)
    parser.add_argument("--limit", type=int, default=4, help="so many prompts of the file, evenly spread")
    parser.add_argument("--depth", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--temp", type=float, default=0.0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
