"""Where the time of a round goes, by depth and by length of the context; compiled rounds beside uncompiled ones.

    python bench/rounds.py [--model demo] [--depth 1 2 4] [--context 512 2048 8192] [--repeats 9] [--out figures.json]

Milliseconds are medians. `whole` is a round as it runs, `uncompiled` the same with mx.compile turned off, and draft,
verify, commit and host are the phases of rounds that wait between them, which others need not. `rows` is C(M)/C(1):
whole rounds over blocks of M rows in a dependent chain, each reading the token that the one before brought, with drafts
that cost nothing. `first_ms` is what the first two rounds of a width took longer than two others: tracing and, on the
CPU, building kernels that are not on disk yet. `growth` compares with the shortest context.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import report
from mlx.utils import tree_flatten
from mlx_lm.generate import wired_limit

import mtp_mlx
from mtp_mlx import bench
from mtp_mlx.choosing import Rules
from mtp_mlx.cli.options import DTYPES
from mtp_mlx.generation import DEFAULT_PREFILL_STEP, encode
from mtp_mlx.ngram import NOBODY
from mtp_mlx.programs import Programs
from mtp_mlx.sequence import Sequence

TEXT = Path(__file__).read_text()


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--depth", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--context", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--rows", type=int, default=9, help="the largest block")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    loaded, tokenizer = mtp_mlx.load(options.model, drafter=options.drafter, dtype=DTYPES[options.dtype])
    pair = loaded.pair
    ids = encode(tokenizer, TEXT)
    contexts: dict[int, dict[str, Any]] = {}
    for length in sorted(options.context):
        prompt = (ids * (length // len(ids) + 1))[:length]
        with wired_limit(pair.target):
            contexts[length] = profile(pair, prompt, options.depth, options.rows, options.repeats)
        report.say(f"{length} tokens: {contexts[length]['depths']}")
    shortest = contexts[min(contexts)]["depths"]
    for found in contexts.values():
        for k, row in found["depths"].items():
            row["growth"] = round(row["whole_ms"] / shortest[k]["whole_ms"], 3)
    settings = {name: vars(options)[name] for name in ("model", "drafter", "dtype", "repeats")}
    settings |= {"precision": str(bench.precision(pair.target)), "trained_context": pair.target.context}
    report.write({"settings": settings, "weights": weights(pair), "contexts": contexts}, options.out)


def profile(pair: mtp_mlx.Pair, prompt: list[int], depths: list[int], most_rows: int, repeats: int) -> dict[str, Any]:
    """All figures of one context, from traces made anew."""
    pair = replace(pair, programs=Programs())
    own = Sequence(pair, Rules())
    own.prefill(prompt, DEFAULT_PREFILL_STEP, lambda done, total: None)
    wanted = [0, *depths]
    first = {k: seconds(lambda k=k: [own.round(k) for _ in range(2)]) for k in wanted}
    free = bench.opened(replace(pair, drafter=NOBODY), prompt)
    whole: dict[int, list[float]] = {k: [] for k in wanted}
    eager: dict[int, list[float]] = {k: [] for k in wanted}
    split: dict[int, list[Any]] = {k: [] for k in wanted}
    verify: dict[int, list[float]] = {rows: [] for rows in range(1, max(most_rows, max(wanted) + 1) + 1)}
    for _ in range(repeats + 1):  # the first one builds kernels
        for k in wanted:
            whole[k].append(bench.steady(own, k))
            split[k].append(own.round(k, split=True).times)
            mx.disable_compile()
            eager[k].append(bench.steady(own, k))
            mx.enable_compile()
        for rows, times in verify.items():
            times.append(bench.steady(free, rows - 1, free=True))
    costs = bench.Costs(*({key: _median(times) for key, times in group.items()} for group in (verify, whole)))
    rows = {
        k: {
            "whole_ms": _ms(whole[k]),
            "uncompiled_ms": _ms(eager[k]),
            **{f"{name}_ms": _ms([times[i] for times in split[k]]) for i, name in PHASES.items()},
            "first_ms": round(1e3 * first[k] - 2 * _ms(whole[k]), 3),
        }
        for k in wanted
    }
    return {
        "tokens": [len(prompt), len(own.text)],
        "cache_bytes": own.cache.nbytes,
        "bytes_per_token": _bytes_per_token(own),
        **costs.figures(),
        "depths": rows,
    }


PHASES = {1: "host", 2: "commit", 3: "draft", 4: "verify"}  # in the order of `mtp_mlx.clock.Times`


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _median(times: list[float]) -> float:
    """Without the first."""
    return statistics.median(times[1:])


def _ms(times: list[float]) -> float:
    return round(1e3 * _median(times), 3)


def _bytes_per_token(sequence: Sequence) -> float:
    """What one token more takes in a longer cache."""
    cache = sequence.cache
    before, capacity = cache.nbytes, cache.capacity
    cache.reserve(capacity + 1)
    return (cache.nbytes - before) / (cache.capacity - capacity)


def weights(pair: mtp_mlx.Pair) -> dict[str, int]:
    """Bytes of all weights, and of those that one token's pass through the target reads."""
    parameters: dict[str, mx.array] = dict(tree_flatten(pair.target.parameters()))
    tied = not any(name.startswith("lm_head.") for name in parameters)
    config = vars(pair.target.config)
    chosen = config.get("top_k_experts") or config.get("num_experts_per_tok") or 0
    read = 0.0
    for name, array in parameters.items():
        if ".embed_tokens_per_layer." in name or (".embed_tokens." in name and not tied):
            continue  # one row of it
        routed = ".switch_" in name
        read += array.nbytes * (chosen / config["num_experts"] if routed else 1)
    return {"target": pair.target.nbytes, "read_per_token": round(read), "drafter": pair.drafter.nbytes}


if __name__ == "__main__":
    main()
