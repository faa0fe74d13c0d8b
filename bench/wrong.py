"""What a drafter that is always wrong costs: `auto` with it against plain decoding, interleaved.

    python bench/wrong.py [--model demo] [--tokens 400] [--repeats 7] [--dtype float32] [--out figures.json]

The pair's own drafter runs at its own cost, but every token is replaced by its neighbour in the vocabulary. The
goal is 0.97 of plain decoding's speed. Each repeat takes a new pair: nothing is known beforehand of what drafting
costs here.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import report

import mtp_mlx
from mtp_mlx.cache import Cache
from mtp_mlx.cli.options import DTYPES
from mtp_mlx.types import Drafter, Pick, Span, State


@dataclass(frozen=True)
class Wrong:
    """A drafter whose every token is off by one."""

    drafter: Drafter

    @property
    def limit(self) -> int:
        return self.drafter.limit

    @property
    def reads_prompt(self) -> bool:
        return self.drafter.reads_prompt

    @property
    def nbytes(self) -> int:
        return self.drafter.nbytes

    def kv_bytes(self, tokens: int) -> int:
        return self.drafter.kv_bytes(tokens)

    def reads(self, cache: Cache) -> int:
        return self.drafter.reads(cache)

    def start(self, cache: Cache) -> State:
        return self.drafter.start(cache)

    def advance(
        self, state: State, cache: Cache, tokens: mx.array, span: Span, hidden: mx.array, count: mx.array
    ) -> State:
        return self.drafter.advance(state, cache, tokens, span, hidden, count)

    def draft(self, state: State, cache: Cache, last: mx.array, k: int, pick: Pick) -> None:
        self.drafter.draft(state, cache, last, k, lambda logits, ids=None: pick(mx.roll(logits, 1, axis=-1), ids))


def main() -> None:
    options = _options()
    loaded, tokenizer = mtp_mlx.load(options.model, drafter=options.drafter, dtype=DTYPES[options.dtype])
    pair = replace(loaded.pair, drafter=Wrong(loaded.pair.drafter))
    prompt = "import os\nimport sys\n\n\ndef main("

    def run(depth: int | str) -> tuple[float, mtp_mlx.Stats]:
        fresh = replace(pair, measured={})
        run = mtp_mlx.stream_generate(fresh, tokenizer, prompt, options.tokens, depth=depth, lookup=False)
        next(run)
        began = time.perf_counter()
        *_, last = run
        return (last.generation_tokens - 1) / (time.perf_counter() - began), last.stats

    arms: dict[str, Callable[[], tuple[float, mtp_mlx.Stats]]] = {"plain": lambda: run(0), "auto": lambda: run("auto")}
    speeds: dict[str, list[float]] = {name: [] for name in arms}
    last: Any = None
    for repeat in range(options.repeats + 1):
        for name, arm in arms.items():
            speed, stats = arm()
            last = stats if name == "auto" else last
            if repeat:
                speeds[name].append(round(speed, 2))
    plain, auto = statistics.median(speeds["plain"]), statistics.median(speeds["auto"])
    figures = {"of_plain": round(auto / plain, 3), "tokens_per_second": speeds}
    told = {"drafted": last.drafted, "accepted": last.accepted, "depth": last.depth, "reason": last.depth_reason}
    settings = {"model": options.model, "dtype": options.dtype, "tokens": options.tokens}
    report.write({"settings": settings, **figures, "last_run": told}, options.out)


def _options() -> argparse.Namespace:
    parser = report.parser(__doc__)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=7)
    return parser.parse_args()


if __name__ == "__main__":
    main()
