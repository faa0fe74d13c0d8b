"""What each of several machines holds and sends, told from shapes: nothing is computed, and nobody is asked.

    python bench/machines.py [--model gemma-31b qwen-27b ...] [--machines 2 3 4 8] [--bits 4 16] [--depth 3]
        [--context 32768] [--out figures.json]

Bytes are those of the machine that holds most. `sums` are the messages of one round, one after the other; of each,
every machine of a ring sends `sent_per_round` / sums on average. The drafter is not counted: all have it whole.
"""

import argparse
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import report
import shapes
from mlx.utils import tree_map

from mtp_mlx.models import gemma4, qwen3_5
from mtp_mlx.models.parts import Part

MODELS = [name for name in shapes.SHAPES if name != "tiny"]


def main() -> None:
    options = _options()
    figures = [
        figure(name, bits, machines, options.depth, options.context)
        for name in options.model
        for bits in options.bits
        for machines in [1, *options.machines]
    ]
    for entry in figures:
        report.say(", ".join(f"{key} {value}" for key, value in entry.items()))
    report.write({"settings": {"depth": options.depth, "context": options.context}, "machines": figures}, options.out)


def figure(name: str, bits: int, machines: int, depth: int, context: int) -> dict[str, Any]:
    """One target on so many machines."""
    held = [held_by(Part(rank, machines, mx.abs), name, bits) for rank in range(machines)]
    model = held[0]
    width = model.config.hidden_size
    sums = [module for module in model.modules() if vars(module).get("total") is mx.abs] if machines > 1 else []
    mixtures = [module for module in sums if vars(module).get("has_experts")]  # two numbers in one message
    payload = (len(sums) + len(mixtures)) * (depth + 1) * width * 2 + 4 * (depth + (4 + depth) + 1)
    return {
        "model": name,
        "bits": bits,
        "machines": machines,
        "weights": max(model.nbytes for model in held),
        "keys_and_values": max(model.kv_bytes(context) for model in held),
        "sums": len(sums) + 3 if machines > 1 else 0,
        "sent_per_round": payload * 2 * (machines - 1) // machines if machines > 1 else 0,
    }


def held_by(part: Part, name: str, bits: int) -> gemma4.Model | qwen3_5.Model:
    """What one machine holds of a target."""
    text = shapes.SHAPES[name][0]
    family: Any = qwen3_5 if name.startswith("qwen") else gemma4
    model: gemma4.Model | qwen3_5.Model = family.Model(family.TextConfig.from_dict(text))
    if bits < 16:
        nn.quantize(model, class_predicate=lambda path, module: shapes._precision(path, module, bits))
    narrow = lambda array: array.astype(mx.bfloat16) if array.dtype == mx.float32 else array  # noqa: E731
    model.update(tree_map(narrow, model.parameters()))
    if part.size > 1:
        for layer in model.layers:
            layer.share(part)
    return model


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, nargs="+", default=MODELS)
    parser.add_argument("--machines", type=int, nargs="+", default=[2, 3, 4, 8])
    parser.add_argument("--bits", type=int, choices=(4, 8, 16), nargs="+", default=[4, 16])
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
