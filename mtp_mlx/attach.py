"""A pair out of a model that mlx-lm has loaded already: its modules are shared, nothing is copied."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tuner.dora import DoRAEmbedding, DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear

from mtp_mlx.checkpoint import Checkpoint, quantise_like
from mtp_mlx.drafter_bits import Bits
from mtp_mlx.errors import PairError
from mtp_mlx.hub import DEMOS, Snapshot, is_hub_id
from mtp_mlx.loading import hollow_target, pair_up
from mtp_mlx.model import Model
from mtp_mlx.types import Target

_log = logging.getLogger(__name__)

_PLAIN = (nn.Linear, nn.Embedding, nn.RMSNorm, nn.Conv1d, SwitchLinear)
_QUANTISED = (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear)
# An adapter around a matrix, and what it calls the matrix.
_ADAPTED: Mapping[type[nn.Module], str] = {
    LoRALinear: "linear",
    LoRASwitchLinear: "linear",
    LoRAEmbedding: "embedding",
    DoRALinear: "linear",
    DoRAEmbedding: "embedding",
}
_SOMEWHERE = "the attached model"  # in messages, where nobody has said what it is called


def attach(
    model: nn.Module,
    drafter: str | Path | None = "auto",
    *,
    tokenizer: TokenizerWrapper | None = None,
    name: str | Path | None = None,
    kv_bits: int | None = None,
    drafter_bits: Bits = "auto",
) -> Model:
    """Give a model of mlx-lm's a drafter. The weights are shared, adapters included, and the model can still be used.

    A model does not know where it came from: `name`, a folder or hub id, or its `tokenizer` says so, and then "auto"
    finds the same drafter as `load` does; without them only the numbers in its config tell. `drafter`, `kv_bits` and
    `drafter_bits` are as for `load`. The model is put into evaluation mode. Projections that mlx-lm keeps in one
    matrix with others, as some models have them, are copied.

    Raises PairError for a model of another architecture, one that is sharded over several machines, and a drafter that
    does not fit; CheckpointError and RequestError as `load` does.
    """
    text, config = _text_of(model)
    called, checkpoint = _origin(config, tokenizer, name)
    target = hollow_target(Checkpoint(checkpoint.folder, config))
    _share(target, text)
    asked = None if drafter is None else str(drafter)
    pair, chosen, reason = pair_up(target, called, checkpoint, asked, drafter_bits=drafter_bits, kv_bits=kv_bits)
    if chosen is None and asked == "auto":
        _log.warning("no drafter: %s", reason)
    return Model(pair, checkpoint.config)


def _text_of(model: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    """The text model inside, and its config as mlx-lm has understood it."""
    kind = type(model)
    if isinstance(model, Model):
        raise PairError("this model has a drafter already; attach another one to the model that mlx-lm has loaded")
    text = model.children().get("language_model", model) if isinstance(model, nn.Module) else None
    arguments = vars(text).get("args") if isinstance(text, nn.Module) else None
    if not kind.__module__.startswith("mlx_lm.models.") or not is_dataclass(arguments) or isinstance(arguments, type):
        raise PairError(
            f"{kind.__module__}.{kind.__qualname__} is no language model of mlx-lm's; load it with mlx_lm.load"
        )
    return text, {**asdict(arguments), "model_type": vars(model)["model_type"]}


def _origin(
    config: dict[str, Any], tokenizer: TokenizerWrapper | None, name: str | Path | None
) -> tuple[str, Checkpoint]:
    """What a model is called, and the checkpoint that it was loaded from; if nobody knows, one without a folder."""
    names = [str(given) for given in (name, None if tokenizer is None else tokenizer.name_or_path) if given]
    folder = next((place for called in names if (place := _folder(called)) is not None), None)
    called = names[0] if names else _SOMEWHERE
    if folder is None:
        return called, Checkpoint(Path(called), config)
    checkpoint = Checkpoint.open(folder)
    if checkpoint.model_type != config["model_type"]:
        raise PairError(
            f"the model is of type {config['model_type']!r}, {folder} holds one of type {checkpoint.model_type!r}; "
            "give the name of the model itself, or its own tokenizer"
        )
    return called, checkpoint


def _folder(name: str) -> Path | None:
    """The folder on this machine that a name means. Nothing is downloaded: the weights are in memory."""
    place = DEMOS.get(name, Path(name).expanduser())
    if place.is_dir():
        return place
    held = Snapshot.held(name) if is_hub_id(name) else None
    return None if held is None else held.folder


def _share(target: Target, source: nn.Module) -> None:
    """Let a network of ours compute with the modules and arrays of mlx-lm's."""
    ours = cast(nn.Module, target)
    shared = dict(_counterparts(ours, source))
    ours.update_modules(tree_unflatten(list(shared.items())))
    theirs: dict[str, mx.array] = dict(tree_flatten(source.parameters()))
    weights: dict[str, mx.array] = ours.sanitize(theirs)
    inside = tuple(f"{path}." for path in shared)
    rest = {path: array for path, array in weights.items() if not path.startswith(inside)}
    quantise_like(ours, rest, _settings(source, shared, rest), _SOMEWHERE)
    _check(dict(tree_flatten(ours.parameters())), weights, rest)
    ours.load_weights(list(rest.items()), strict=False)
    ours.eval()


def _counterparts(ours: nn.Module, source: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of mlx-lm's model that stand for the same in ours, by path."""
    theirs = dict(source.named_modules())
    for path, module in ours.named_modules():
        if isinstance(module, _PLAIN) and path in theirs:
            _check_module(path, module, theirs[path])
            yield path, theirs[path]


def _check_module(path: str, module: nn.Module, theirs: nn.Module) -> None:
    """Raises PairError for a module of a kind that is not known, or of another size, as a shard is."""
    inner = theirs[_ADAPTED[type(theirs)]] if type(theirs) in _ADAPTED else theirs
    if type(inner) not in (*_PLAIN, *_QUANTISED):
        raise PairError(
            f"{path} is a {type(inner).__name__}, which cannot be shared; load the model anew with mlx_lm.load"
        )
    whole = slice(None, -1) if type(inner) in _QUANTISED else slice(None)  # the last is packed
    if inner.weight.shape[whole] != module.weight.shape[whole]:
        raise PairError(
            f"{path} is {inner.weight.shape}, the model's config means {module.weight.shape}; if the model is spread "
            "over several machines, load it on one"
        )


def _settings(
    source: nn.Module, shared: Mapping[str, nn.Module], rest: Mapping[str, mx.array]
) -> dict[str, dict[str, Any]]:
    """How matrices are quantised that mlx-lm keeps in one piece with others, where their shapes do not tell."""
    packed = {
        path.rpartition(".")[0]: {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
        for path, module in source.named_modules()
        if isinstance(module, nn.QuantizedLinear) and path not in shared
    }
    names = [name.removesuffix(".scales") for name in rest if name.endswith(".scales")]
    return {name: packed[name.rpartition(".")[0]] for name in names if f"{name}.biases" not in rest}


def _check(wanted: Mapping[str, mx.array], weights: Mapping[str, mx.array], rest: Mapping[str, mx.array]) -> None:
    """Raises PairError unless each of our parameters, and nothing else, is in mlx-lm's model, with the same shape."""
    strange = sorted(wanted.keys() ^ weights.keys())
    if strange:
        side = "lacks" if strange[0] in wanted else "has the unknown"
        raise PairError(
            f"the model {side} {strange[0]}; if that comes from an adapter, fuse it (mlx_lm.fuse) or load the model "
            "and its adapter with mtp_mlx.load"
        )
    for name, array in rest.items():
        if array.shape != wanted[name].shape:
            raise PairError(f"the model's {name} is {array.shape}, its config means {wanted[name].shape}")
