"""Plain decoding with the next step submitted before the last one is read, against one step at a time.

    python bench/ahead.py [--model demo] [--capacity 512 8192 32768] [--tokens 32] [--repeats 5] [--out figures.json]

A step in flight still reads the buffers that the next one writes, so MLX copies them. Capacities are slots of the
full layers' buffers, empty ones included; both arms attend over the same ones. Medians over the repeats, interleaved.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import report

import mtp_mlx
from mtp_mlx import steps
from mtp_mlx.cache import Cache
from mtp_mlx.choosing import Rules
from mtp_mlx.types import Pair

CONTEXT = (mx.zeros((1,), mx.uint32), mx.zeros((1, 0), mx.int32))  # no seed, no penalties


def main() -> None:
    options = _options()
    pair = mtp_mlx.load(options.model, drafter=None)[0].pair
    arms: dict[str, Callable[[Pair, int, int], tuple[float, int]]] = {"one at a time": _synchronous, "ahead": _ahead}
    figures: dict[str, Any] = {}
    for capacity in options.capacity:
        runs: dict[str, list[tuple[float, int]]] = {name: [] for name in arms}
        for repeat in range(options.repeats + 1):
            for name, arm in arms.items():
                seconds_and_peak = arm(pair, capacity, options.tokens)
                if repeat:
                    runs[name].append(seconds_and_peak)
        figures[str(capacity)] = {
            name: {
                "ms_per_token": round(1e3 * statistics.median(seconds for seconds, _ in found), 3),
                "bytes_beside_the_cache": max(peak for _, peak in found),
            }
            for name, found in runs.items()
        }
    report.write({"settings": {"model": options.model, "tokens": options.tokens}, "capacities": figures}, options.out)


def _start(pair: Pair, capacity: int) -> tuple[Cache, mx.array]:
    cache = pair.target.make_cache()
    cache.reserve(capacity)
    last = mx.array([[5]], mx.int32)
    for _ in range(3):
        last = _step(pair, cache, last)
        mx.eval(last, cache.arrays())
    mx.reset_peak_memory()
    return cache, last


def _step(pair: Pair, cache: Cache, last: mx.array) -> mx.array:
    """The next token, (1, 1), from the one before it; nothing is read by the host."""
    report_, _, _ = pair.programs.run(steps.judge, pair.target, cache, Rules(), last, [], CONTEXT)
    fixed = (True, False, None)
    pair.programs.run(steps.keep, pair.drafter, cache, fixed, (), last, last, mx.array([1], mx.int32))
    return report_[None, -1:]


def _synchronous(pair: Pair, capacity: int, tokens: int) -> tuple[float, int]:
    cache, last = _start(pair, capacity)
    before, began = mx.get_active_memory(), time.perf_counter()
    for _ in range(tokens):
        last = _step(pair, cache, last)
        mx.eval(last, cache.arrays())
        last.item()
    return (time.perf_counter() - began) / tokens, mx.get_peak_memory() - before


def _ahead(pair: Pair, capacity: int, tokens: int) -> tuple[float, int]:
    cache, last = _start(pair, capacity)
    before, began = mx.get_active_memory(), time.perf_counter()
    last = _step(pair, cache, last)
    mx.async_eval(last, cache.arrays())
    for _ in range(tokens):
        following = _step(pair, cache, last)
        mx.async_eval(following, cache.arrays())
        last.item()
        last = following
    mx.eval(last)
    return (time.perf_counter() - began) / (tokens + 1), mx.get_peak_memory() - before


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--capacity", type=int, nargs="+", default=[512, 8192, 32768])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
