"""LoRA, DoRA and full fine-tunes in mlx-lm's format, put onto a target."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from mtp_mlx.checkpoint import read_header, read_json
from mtp_mlx.errors import CheckpointError
from mtp_mlx.models.base import rename

CONFIG, TENSORS = "adapter_config.json", "adapters.safetensors"
LARGEST_RANK = 2**14
_LEAVES = ("lora_a", "lora_b", "m")  # what an adapter brings to a layer


def apply(target: nn.Module, folder: Path) -> str:
    """Put an adapter onto a target, and say what it is.

    Its layers stay beside the target's, as in mlx-lm, and the text is what mlx-lm writes with it.
    Raises CheckpointError for an adapter that is missing, damaged, of another format or made for another model.
    """
    config = _config(folder)
    kind = str(config.get("fine_tune_type", "lora"))
    if kind not in ("lora", "dora", "full"):
        raise CheckpointError(f"{folder} has fine_tune_type {kind!r}; known are lora, dora and full")
    read_header(folder / TENSORS)
    if kind != "full":
        _wrap(target, folder, config, dora=kind == "dora")
    loaded = mx.load(str(folder / TENSORS))
    assert isinstance(loaded, dict)
    weights = {rename(name): array for name, array in loaded.items()}
    _check(target, weights, folder, full=kind == "full")
    target.load_weights(list(weights.items()), strict=False)
    target.eval()
    mx.eval(target.parameters())
    if kind == "full":
        return f"{len(weights)} tensors of a full fine-tune"
    touched = {name.rpartition(".")[0] for name in weights}
    return f"{kind} of rank {config['lora_parameters']['rank']} on {len(touched)} matrices"


def base_model(folder: Path) -> str | None:
    """What an adapter was made for, if its folder says."""
    named = _config(folder).get("model")
    return named if isinstance(named, str) and named else None


def _config(folder: Path) -> Mapping[str, Any]:
    if not folder.is_dir():
        raise CheckpointError(f"the adapter {folder} is not a folder; give the one that mlx_lm.lora has written")
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} has no {CONFIG}; give the folder that mlx_lm.lora has written")
    config = read_json(folder / CONFIG)
    if "peft_type" in config or (folder / "adapter_model.safetensors").is_file():
        raise CheckpointError(
            f"{folder} is an adapter in PEFT's format; merge it into its base model and convert that, or train it with "
            "mlx_lm.lora"
        )
    return config


def _wrap(target: nn.Module, folder: Path, config: Mapping[str, Any], dora: bool) -> None:
    parameters = config.get("lora_parameters")
    layers = config.get("num_layers")
    if not (isinstance(parameters, Mapping) and _are_sane(parameters) and type(layers) is int):
        raise CheckpointError(
            f"{folder / CONFIG} must have num_layers, and lora_parameters with a whole rank from 1 to {LARGEST_RANK}, "
            "numbers for scale and dropout, and keys, if any, that name modules; mlx_lm.lora writes them so"
        )
    assert isinstance(parameters, Mapping)
    own = dict(parameters)
    if own.get("keys") is not None:
        own["keys"] = {rename(str(key)) for key in own["keys"]}
    try:
        linear_to_lora_layers(target, layers, own, use_dora=dora)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder} cannot be put onto this target: {error}") from error


def _are_sane(parameters: Mapping[str, Any]) -> bool:
    rank, keys = parameters.get("rank"), parameters.get("keys")
    scale, dropout = parameters.get("scale"), parameters.get("dropout")
    named = keys is None or (isinstance(keys, list) and bool(keys) and all(isinstance(key, str) for key in keys))
    if type(rank) is not int or not 0 < rank <= LARGEST_RANK or not named:
        return False
    return all(isinstance(n, int | float) and math.isfinite(n) for n in (scale, dropout))


def _check(target: nn.Module, weights: Mapping[str, mx.array], folder: Path, full: bool) -> None:
    known: dict[str, mx.array] = dict(tree_flatten(target.parameters()))
    allowed = {name: array for name, array in known.items() if full or name.rpartition(".")[2] in _LEAVES}
    for name, array in weights.items():
        if name not in allowed:
            raise CheckpointError(f"{folder} changes {name}, which this target does not have; it was made for another")
        if not mx.issubdtype(array.dtype, mx.floating) and mx.issubdtype(allowed[name].dtype, mx.floating):
            raise CheckpointError(f"{folder}: {name} is {array.dtype}, expected floating-point numbers")
        if array.shape != allowed[name].shape:
            raise CheckpointError(
                f"{folder}: {name} has shape {array.shape}, this target needs {allowed[name].shape}; it was made for "
                "another model"
            )
    if not weights:
        raise CheckpointError(f"{folder / TENSORS} is empty; train the adapter again")
    absent = {} if full else {name for name in allowed if name not in weights}
    if absent:
        raise CheckpointError(f"{folder} lacks {len(absent)} tensors that its config calls for, {min(absent)} first")
