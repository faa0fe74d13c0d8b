"""Costs of rounds at the shapes of released models, with random weights: what a GPU makes of them.

    python bench/shapes.py --model gemma-31b|gemma-26b-a4b|qwen-27b|tiny [--layers N] [--bits 4] [--drafter-bits 4]
        [--depth 1 2 3 4] [--context 512] [--repeats 9] [--out figures.json]

Figures are those of bench/rounds.py: C(M)/C(1) in a dependent chain, a draft step, phases, compiled and uncompiled.
Weights are affine with groups of 64, routers with 8 bits as in released conversions. A packed tensor is drawn as it is,
so no full-precision copy of it ever exists. The texts are nonsense and acceptance is next to none. Experts are chosen
almost independently from row to row, so a block of a mixture of experts costs more here than it does on real text.
--layers cuts the target's depth, for a machine with less memory; `tiny` runs anywhere.
"""

import argparse
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import report
import rounds
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.generate import wired_limit
from mlx_lm.models.switch_layers import SwitchLinear

from mtp_mlx import bench
from mtp_mlx.cli.options import DTYPES
from mtp_mlx.models import gemma4, gemma4_assistant, qwen3_5, qwen3_5_mtp
from mtp_mlx.types import Pair

GROUP = 64
GEMMA: dict[str, Any] = {
    "vocab_size": 262144, "final_logit_softcapping": 30.0, "attention_k_eq_v": True, "sliding_window": 1024,
    "max_position_embeddings": 262144, "hidden_size_per_layer_input": 0, "tie_word_embeddings": True,
}  # fmt: skip
HEADS_31B = {"num_attention_heads": 32, "num_key_value_heads": 16, "num_global_key_value_heads": 4}
HEADS_26B = {"num_attention_heads": 16, "num_key_value_heads": 8, "num_global_key_value_heads": 2}
HEADS_TINY = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_global_key_value_heads": 1}
MOE = {"enable_moe_block": True, "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704}
SMALL = {"vocab_size": 512, "head_dim": 64, "global_head_dim": 64}
ASSISTANT = {"hidden_size": 1024, "intermediate_size": 8192, "final_logit_softcapping": None}
ASSISTANT_LAYERS = [gemma4.SLIDING] * 3 + [gemma4.FULL]
# Target and assistant; for Qwen the head's config is the target's.
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "gemma-31b": (
        GEMMA | HEADS_31B | {"hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 60},
        GEMMA | HEADS_31B | ASSISTANT,
    ),
    "gemma-26b-a4b": (
        GEMMA | HEADS_26B | MOE | {"hidden_size": 2816, "intermediate_size": 2112, "num_hidden_layers": 30},
        GEMMA | HEADS_26B | ASSISTANT,
    ),
    "qwen-27b": (
        {
            "vocab_size": 248320, "hidden_size": 5120, "intermediate_size": 17408, "num_hidden_layers": 64,
            "num_attention_heads": 24, "num_key_value_heads": 4, "head_dim": 256, "linear_num_key_heads": 16,
            "linear_num_value_heads": 48, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
            "rope_theta": 1e7, "partial_rotary_factor": 0.25, "mtp_num_hidden_layers": 1,
        },
        None,
    ),
    "tiny": (
        GEMMA | HEADS_TINY | SMALL | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6},
        GEMMA | HEADS_TINY | SMALL | ASSISTANT | {"hidden_size": 128, "intermediate_size": 256},
    ),
}  # fmt: skip


def main() -> None:
    options = _options()
    text, assistant = SHAPES[options.model]
    layers = options.layers or text["num_hidden_layers"]
    dtype = DTYPES[options.dtype] or (mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16)
    pair = build(text | {"num_hidden_layers": layers}, assistant, options, dtype)
    prompt: Any = mx.random.randint(0, text["vocab_size"], (options.context,)).tolist()
    report.say(f"{pair.target.nbytes / 1e9:.2f} GB of target, {pair.drafter.nbytes / 1e9:.2f} GB of drafter")
    settings = {name: vars(options)[name] for name in ("model", "bits", "drafter_bits", "context", "repeats")}
    settings |= {"layers": layers, "of": text["num_hidden_layers"], "precision": str(bench.precision(pair.target))}
    with wired_limit(pair.target):
        figures = rounds.profile(pair, prompt, options.depth, options.rows, options.repeats)
    peak = {"peak_bytes": mx.get_peak_memory()}
    report.write({"settings": settings, "weights": rounds.weights(pair) | peak, "rounds": figures}, options.out)


def build(text: dict[str, Any], assistant: dict[str, Any] | None, options: argparse.Namespace, dtype: mx.Dtype) -> Pair:
    """A pair with random weights."""
    if assistant is None:
        config = qwen3_5.TextConfig.from_dict(text)
        qwen, head = qwen3_5.Model(config), qwen3_5_mtp.Network(config)
        fill(qwen, options.bits, dtype)
        fill(head, options.drafter_bits, dtype)
        return Pair(qwen, qwen3_5_mtp.Head(head, qwen))
    gemma = gemma4.Model(gemma4.TextConfig.from_dict(text))
    inner = assistant | {"num_hidden_layers": len(ASSISTANT_LAYERS), "layer_types": ASSISTANT_LAYERS}
    config = {"text_config": inner, "backbone_hidden_size": text["hidden_size"]}
    network = gemma4_assistant.Model(gemma4_assistant.Config.from_dict(config))
    fill(gemma, options.bits, dtype)
    fill(network, options.drafter_bits, dtype)
    return Pair(gemma, gemma4_assistant.Assistant(network, gemma))


def fill(model: nn.Module, bits: int, dtype: mx.Dtype) -> None:
    """Give a model random weights, one tensor at a time; what it was made with is lazy and is never computed."""
    if bits < 16:
        nn.quantize(model, class_predicate=lambda path, module: _precision(path, module, bits))
    lazy: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    shapes = {name: array.shape for name, array in lazy.items()}
    for name in shapes:
        value = _random(name, lazy.pop(name), shapes, dtype)
        mx.eval(value)
        model.update(tree_unflatten([(name, value)]))
    model.eval()


ROUTERS = ("router.proj", "mlp.gate", "shared_expert_gate")


def _precision(path: str, module: nn.Module, bits: int) -> bool | dict[str, int]:
    fits = isinstance(module, nn.Linear | nn.Embedding | SwitchLinear)
    return {"group_size": GROUP, "bits": 8 if path.endswith(ROUTERS) else bits} if fits else False


def _random(name: str, array: mx.array, shapes: dict[str, tuple[int, ...]], dtype: mx.Dtype) -> mx.array:
    """A value like this parameter's: packed integers as they come, scales that give rows of length 1."""
    stem, kind = name.rsplit(".", 1)
    if array.dtype == mx.uint32:
        return mx.random.randint(-(2**31), 2**31 - 1, array.shape, mx.int32).view(mx.uint32)
    if kind in ("scales", "biases"):
        width = array.shape[-1] * GROUP
        steps = 2 ** (32 * shapes[f"{stem}.weight"][-1] // width) - 1
        scale = 12**0.5 / (steps * width**0.5)  # uniform integers have a deviation of steps / sqrt(12)
        return mx.full(array.shape, scale if kind == "scales" else -scale * steps / 2, dtype)
    return array.astype(mx.float32 if name.endswith("A_log") else dtype)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="tiny")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--bits", type=int, choices=(4, 8, 16), default=4)
    parser.add_argument("--drafter-bits", type=int, choices=(4, 8, 16), default=4)
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="of what is computed; auto is bfloat16 on a GPU"
    )
    parser.add_argument("--depth", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--rows", type=int, default=9, help="the largest block")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
