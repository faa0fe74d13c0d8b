"""What the architectures share: checks of a config's numbers, names of tensors, experts split or stacked."""

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import Field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten


def check_numbers(
    values: Mapping[str, Any], entries: Collection[Field[Any]], may_be_zero: Collection[str] = ()
) -> None:
    """Raises ValueError where a field of type bool or int holds something else, or a number below 1 (or 0)."""
    for entry in entries:
        value = values[entry.name]
        if entry.type is bool and not isinstance(value, bool):
            raise ValueError(f"{entry.name} is {value!r}, expected true or false")
        least = 0 if entry.name in may_be_zero else 1
        if entry.type is int and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise ValueError(f"{entry.name} is {value!r}, expected a whole number of at least {least}")


def check_positive(name: str, value: object) -> None:
    """Raises ValueError unless a value is a number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name} is {value!r}, expected a number above 0")


def check_choices(text: Mapping[str, Any], only: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises ValueError where a config asks for what cannot be computed; the first choice is the default."""
    for name, known in only.items():
        if text.get(name, known[0]) not in known:
            raise ValueError(f"{name} is {text[name]!r}, only {' and '.join(map(repr, known))} can be computed")


def split_heads(x: mx.array, size: int) -> mx.array:
    """(B, L, H * size) -> (B, L, H, size)."""
    B, L, _ = x.shape
    return x.reshape(B, L, -1, size)


def weight_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters."""
    parameters: dict[str, mx.array] = dict(tree_flatten(module.parameters()))
    return sum(array.nbytes for array in parameters.values())


def rename(name: str) -> str:
    """A tensor or module name without the wrapper around the text model.

    >>> rename("model.language_model.norm.weight"), rename("language_model.model.norm.weight")
    ('model.norm.weight', 'model.norm.weight')
    """
    if name.startswith("language_model."):  # converted by mlx-lm
        return name.removeprefix("language_model.")
    if name.startswith("model.language_model."):  # released
        return "model." + name.removeprefix("model.language_model.")
    return name


def is_head(names: Collection[str]) -> bool:
    """Whether there is an mtp head among tensors of these names."""
    return is_bare(names) or any(HEAD_PREFIX.match(name) for name in names)


def is_bare(names: Collection[str]) -> bool:
    """Whether a file holds an mtp head and nothing else, and leaves the prefix out."""
    return HEAD_WIDTH in names


HEAD_WIDTH = "pre_fc_norm_hidden.weight"  # as wide as the target's hidden, and never quantised
HEAD_PREFIX = re.compile(r"^(model\.|language_model\.)*mtp\.")


def split_experts(name: str, array: mx.array, module: str) -> Iterator[tuple[str, mx.array]]:
    """Released files pack the experts' gate and up projections into one tensor, gate first; `module` holds both."""
    packed = re.fullmatch(r"(.*)experts\.gate_up_proj(\.\w+)?", name)
    down = re.fullmatch(r"(.*)experts\.down_proj(\.\w+)?", name)
    if packed:
        gate, up = mx.split(array, 2, axis=-2)
        base, kind = packed[1] + module, packed[2] or ".weight"
        yield f"{base}.gate_proj{kind}", mx.contiguous(gate)
        yield f"{base}.up_proj{kind}", mx.contiguous(up)
    elif down:
        yield f"{down[1]}{module}.down_proj{down[2] or '.weight'}", array
    else:
        yield name, array


def stack_experts(weights: Mapping[str, mx.array], module: str) -> dict[str, mx.array]:
    """Files with one tensor for each expert, `experts.3.up_proj.weight`, as one stack in `module`.

    Raises ValueError where an expert is missing.
    """
    stacks: dict[str, dict[int, mx.array]] = {}
    kept: dict[str, mx.array] = {}
    for name, array in weights.items():
        single = re.fullmatch(r"(.*)experts\.(\d+)\.(\w+\.\w+)", name)
        if single:
            stacks.setdefault(f"{single[1]}{module}.{single[3]}", {})[int(single[2])] = array
        else:
            kept[name] = array
    for name, experts in stacks.items():
        missing = set(range(max(experts) + 1)) - experts.keys()
        if missing:
            raise ValueError(f"{name} lacks expert {min(missing)} of {max(experts) + 1}")
        kept[name] = mx.stack([experts[e] for e in sorted(experts)])
    return kept
