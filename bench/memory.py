"""What `mtp-mlx inspect` tells beforehand against what a run holds: weights, drafter, cache, and all of MLX's memory.

    python bench/memory.py [--model demo demo-qwen random] [--context 600] [--out figures.json]

`random` is a pair of about 100 million parameters without any training, written to a temporary folder. `active` is what
MLX says it holds after a prompt of so many tokens and three rounds of two drafts, less what it held before loading.
Every ratio should be within 5 % of 1; the exit code is 1 where one is not.
"""

import argparse
import gc
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import report
from mlx.utils import tree_flatten

from mtp_mlx import bench
from mtp_mlx.hub import DEMOS
from mtp_mlx.loading import load_pair
from mtp_mlx.models import gemma4, gemma4_assistant
from mtp_mlx.outline import outline

RANDOM = "random"
TOLERANCE = 0.05
DRAFTS, ROUNDS = 2, 3
SIZES = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "num_hidden_layers": 8}
WINDOWS = ["sliding_attention"] * 3 + ["full_attention"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=[*DEMOS, RANDOM])
    parser.add_argument("--context", type=int, default=600)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        names = {name: write_random(Path(scratch)) if name == RANDOM else name for name in options.model}
        found = {name: compare(name, place, options.context) for name, place in names.items()}
    report.write({"settings": {"context": options.context, "drafts": DRAFTS}, "models": found}, options.out)
    far = [
        (name, what)
        for name, row in found.items()
        for what, ratio in row["ratio"].items()
        if abs(ratio - 1) > TOLERANCE
    ]
    if far:
        sys.exit(f"more than {TOLERANCE:.0%} off: {far}")


def compare(name: str, place: str, context: int) -> dict[str, Any]:
    """Bytes told and held, and the ratio of the two."""
    told = outline(place, contexts=[context])
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    loaded = load_pair(place)
    sequence = bench.opened(loaded.pair, [5 + i % 200 for i in range(context - ROUNDS * (DRAFTS + 1) - 1)])
    for _ in range(ROUNDS):
        sequence.round(DRAFTS)
    mx.eval(sequence.cache.arrays(), sequence.state)
    gc.collect()
    mx.clear_cache()
    assert told.drafter_weights is not None
    held = {
        "target": loaded.pair.target.nbytes,
        "drafter": loaded.pair.drafter.nbytes,
        "cache": sequence.cache.nbytes,
        "active": mx.get_active_memory() - before,
    }
    entry = told.contexts[0]
    said = {
        "target": told.weights.nbytes,
        "drafter": told.drafter_weights.nbytes,
        "cache": entry.cache,
        "active": entry.total,
    }
    ratio = {what: round(said[what] / held[what], 4) for what in held}
    report.say(f"{name}: {ratio}")
    return {"told": said, "held": held, "ratio": ratio, "tokens": sequence.length}


def write_random(scratch: Path) -> str:
    """A pair of random weights in bfloat16 with the demo's tokenizer: its folder."""
    folder = Path(shutil.copytree(DEMOS["demo"], scratch / RANDOM))
    text = {"layer_types": 2 * WINDOWS, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0}
    config = _rewrite(folder / "config.json", {}, SIZES | text)
    model = gemma4.Model(gemma4.TextConfig.from_dict(config))
    _save(model.parameters(), folder)
    small = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "layer_types": WINDOWS}
    drafter = {"backbone_hidden_size": SIZES["hidden_size"], "use_ordered_embeddings": False}
    config = _rewrite(folder / "assistant" / "config.json", drafter, small | {"num_kv_shared_layers": 4})
    network = gemma4_assistant.Model(gemma4_assistant.Config.from_dict(config))
    _save(network.parameters(), folder / "assistant")
    return str(folder)


def _rewrite(path: Path, changes: dict[str, Any], text: dict[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(path.read_text()) | changes
    config["text_config"] |= text
    path.write_text(json.dumps(config))
    return config


def _save(parameters: Any, folder: Path) -> None:
    arrays: dict[str, mx.array] = dict(tree_flatten(parameters))
    mx.save_safetensors(
        str(folder / "model.safetensors"), {name: array.astype(mx.bfloat16) for name, array in arrays.items()}
    )


if __name__ == "__main__":
    main()
