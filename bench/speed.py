"""Speed of every depth against plain decoding and against mlx-lm, interleaved in one process.

    python bench/speed.py [--model demo] [--depth 1 2 4 auto] [--repeats 5] [--dtype float32] [--out figures.json]

One repeat runs every arm once, one after the other, on the same prompt; figures are medians over the repeats, and
what counts is the ratio to our own depth 0 and to mlx-lm's generate. Throughput is tokens after the first, over the
time from the first to the last. The first repeat is not counted: kernels are still being built.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import mlx_lm
import report
from mlx_lm.generate import GenerationResponse

import mtp_mlx
from mtp_mlx.cli.generate import DTYPES
from mtp_mlx.loading import find

PROMPTS = Path(__file__).parent / "demo" / "heldout.json"
Arm = Callable[[str], Iterable[GenerationResponse]]


def main() -> None:
    options = _options()
    dtype = DTYPES[options.dtype]
    pair, tokenizer = mtp_mlx.load(options.model, options.drafter, dtype=dtype)
    theirs, their_tokenizer = mlx_lm.load(str(find(options.model)))
    if dtype is not None:
        theirs.set_dtype(dtype)

    def ours(depth: int | str) -> Arm:
        return lambda prompt: mtp_mlx.stream_generate(pair, tokenizer, prompt, options.tokens, depth=depth)

    arms: dict[str, Arm] = {
        "mlx-lm": lambda prompt: mlx_lm.stream_generate(theirs, their_tokenizer, prompt, options.tokens),
        "depth 0": ours(0),
        **{f"depth {depth}": ours(depth) for depth in options.depth},
    }
    texts = json.loads(PROMPTS.read_text())
    prompts = [texts[i * len(texts) // options.prompts]["text"] for i in range(options.prompts)]
    speeds = _measure(arms, prompts, options.repeats)
    base, peer = statistics.median(speeds["depth 0"]), statistics.median(speeds["mlx-lm"])
    figures = {
        name: {
            "tokens_per_second": round(statistics.median(values), 2),
            "against_depth_0": round(statistics.median(values) / base, 3),
            "against_mlx_lm": round(statistics.median(values) / peer, 3),
            "all": [round(value, 2) for value in values],
        }
        for name, values in speeds.items()
    }
    settings = {
        "model": options.model,
        "dtype": options.dtype,
        "tokens": options.tokens,
        "prompts": len(prompts),
    }
    report.write({"settings": settings, "arms": figures}, options.out)


def _measure(arms: dict[str, Arm], prompts: list[str], repeats: int) -> dict[str, list[float]]:
    """Tokens per second of every arm, one figure for each counted repeat over all prompts."""
    speeds: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(repeats + 1):
        for name, arm in arms.items():
            tokens, seconds = 0, 0.0
            for prompt in prompts:
                times = [time.perf_counter() for _ in arm(prompt)]
                tokens, seconds = tokens + len(times) - 1, seconds + times[-1] - times[0]
            if repeat:
                speeds[name].append(tokens / seconds)
            print(f"repeat {repeat} {name}: {tokens / seconds:.1f} tok/s", file=sys.stderr)
    return speeds


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--drafter", default="auto")
    parser.add_argument("--depth", nargs="+", type=lambda d: d if d == "auto" else int(d), default=[1, 2, 4, "auto"])
    parser.add_argument("--dtype", choices=DTYPES, default="auto")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
