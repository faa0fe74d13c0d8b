"""What a recurrent layer holds and costs in a round, at the sizes of released models.

    python bench/recurrence.py [--rows 4] [--repeats 20] [--out figures.json]

Bytes are those of `RecurrentCache` against the formula beside them, and against a cache with a state for every row.
Times are medians in milliseconds: a block of that many rows through the recurrence, and its commit when a part was
rejected. The last figures show what becomes of a decay that is handed to MLX in bfloat16.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import report

from mtp_mlx.cache import RecurrentCache

KERNEL = 4
# Key heads, value heads, size of both.
SIZES = {"27B": (16, 48, 128), "35B-A3B": (16, 32, 128), "0.8B": (16, 16, 128)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    layers = {name: layer(*size, options.rows, options.repeats) for name, size in SIZES.items()}
    figures = {"settings": {"rows": options.rows}, "one layer": layers, "decay": rounding()}
    report.write(figures, options.out)


def layer(key_heads: int, value_heads: int, size: int, rows: int, repeats: int) -> dict[str, Any]:
    channels = (2 * key_heads + value_heads) * size
    cache = RecurrentCache(KERNEL)
    put(cache, block(1, key_heads, value_heads, size))
    cache.commit(1)
    inputs = block(rows, key_heads, value_heads, size)
    put(cache, inputs)
    held = sum(array.nbytes for array in cache.arrays())
    state = 4 * value_heads * size * size
    row = 2 * (channels + (key_heads + value_heads) * size + value_heads) + 4 * value_heads
    tail = 2 * (KERNEL - 1) * channels

    def forward() -> list[mx.array]:
        put(cache, inputs)
        return cache.arrays()

    def rejection() -> list[mx.array]:
        cache.commit(mx.array([1]))
        return cache.arrays()

    times: dict[str, list[float]] = {"forward": [], "commit": []}
    for _ in range(repeats):
        times["forward"].append(seconds(forward))
        times["commit"].append(seconds(rejection))
    return {
        "bytes held in a round": held,
        "formula: 2 states, 2 tails, rows": 2 * (state + tail) + rows * row,
        "bytes with a state for every row": (rows + 1) * state + 2 * tail,
        "forward ms": round(1e3 * statistics.median(times["forward"]), 3),
        "commit ms": round(1e3 * statistics.median(times["commit"]), 3),
    }


def block(rows: int, key_heads: int, value_heads: int, size: int) -> list[mx.array]:
    """The convolution's input, queries, keys, values, decay and beta, in bfloat16 but for the decay."""
    channels = (2 * key_heads + value_heads) * size
    shapes = [(channels,), (key_heads, size), (key_heads, size), (value_heads, size)]
    random = [mx.random.normal((1, rows, *shape)) * size**-0.5 for shape in shapes]
    decay = mx.random.uniform(0.99, 1.0, (1, rows, value_heads))
    beta = mx.random.uniform(0.0, 1.0, (1, rows, value_heads))
    inputs = [*(array.astype(mx.bfloat16) for array in random), decay, beta.astype(mx.bfloat16)]
    mx.eval(inputs)
    return inputs


def put(cache: RecurrentCache, inputs: list[mx.array]) -> None:
    cache.extend(inputs[0])
    mx.eval(cache.recur(*inputs[1:]), cache.arrays())


def seconds(call: Callable[[], list[mx.array]]) -> float:
    began = time.perf_counter()
    mx.eval(call())
    return time.perf_counter() - began


def rounding() -> dict[str, float]:
    """Largest error of the state after 64 rows with decays between 0.99 and 1, as handed over and in float32."""
    _, queries, keys, values, decay, beta = block(64, 2, 4, 64)
    wide = [array.astype(mx.float32) for array in (queries, keys, values, decay, beta)]
    update: Any = mx.fast.gated_delta_update
    state = mx.zeros((1, 4, 64, 64))
    for t in range(64):
        k, v, g, b = (array[:, t] for array in wide[1:])
        k = mx.repeat(k, 2, axis=1)
        state = state * g[..., None, None]
        state = state + k[..., None, :] * ((v - (state * k[..., None, :]).sum(-1)) * b[..., None])[..., None]
    errors = {
        "bfloat16 rows": mx.abs(update(queries, keys, values, decay, beta)[1] - state).max().item(),
        "float32 rows": mx.abs(update(*wide)[1] - state).max().item(),
        "largest entry": mx.abs(state).max().item(),
    }
    return {name: float(value) for name, value in errors.items()}


if __name__ == "__main__":
    main()
