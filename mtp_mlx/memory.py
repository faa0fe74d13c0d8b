"""What a model takes in memory and reads for a token, told from shapes alone: weights, keys and values, states.

The sums are those of cache.py's buffers as they are allocated, not of the tokens in them. Bytes throughout.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from mtp_mlx.cache import MAX_BLOCK, bucket, kv_group


@dataclass(frozen=True)
class Rows:
    """The keys and values of one cache."""

    heads: int
    size: int  # of a head
    window: int | None = None  # None: every token's
    readers: int = 1  # layers that attend to them
    owned: bool = True  # a drafter may read the target's

    def capacity(self, tokens: int) -> int:
        """Slots for so many tokens."""
        return bucket(tokens) if self.window is None else self.window + MAX_BLOCK

    def nbytes(self, tokens: int, kv_bits: int | None, itemsize: int) -> int:
        """Keys and values; only those of every token are ever quantised."""
        bits = kv_bits if self.window is None else None
        return 2 * self.heads * self.capacity(tokens) * _head_bytes(self.size, bits, itemsize)


def _head_bytes(size: int, bits: int | None, itemsize: int) -> int:
    """One key or value: as it is, or packed with a scale and a bias for each group."""
    if bits is None:
        return size * itemsize
    return size * bits // 8 + 2 * (size // kv_group(size)) * itemsize


@dataclass(frozen=True)
class Recurrence:
    """The state of one recurrent layer, and what a block leaves there until it is known which rows are kept."""

    state: int  # numbers, in float32
    tail: int  # numbers that the convolution before it still sees
    row: int  # numbers that each row of a block leaves, those in float32 left out
    exact_row: int  # numbers in float32 that each row of a block leaves

    def nbytes(self, block: int, itemsize: int) -> int:
        """With a block of so many rows: the state before it and after it, its rows twice joined to the tail."""
        held = 4 * self.state + itemsize * self.tail
        return held if not block else 2 * held + block * (itemsize * self.row + 4 * self.exact_row)


Layout = tuple[Rows | Recurrence, ...]  # one entry for each cache


class Traffic(NamedTuple):
    """Which of its weights a network reads for a token."""

    chosen: int = 0  # experts of each mixture; 0: there are none
    output: str | None = None  # module that gives the logits; None: the target's is used
    share: float = 1.0  # of that module's rows


class Network(Protocol):
    """A network whose memory can be told."""

    @property
    def layout(self) -> Layout:
        """What it remembers of a text."""
        ...

    @property
    def traffic(self) -> Traffic: ...


def kv_bytes(layout: Layout, tokens: int, kv_bits: int | None = None, itemsize: int = 2, block: int = 1) -> int:
    """What a cache holds for a text of so many tokens, between two rounds whose blocks had `block` rows.

    `kv_bits` is 4 or 8 for quantised keys and values, None for rows of `itemsize` bytes a number. Raises ValueError
    for heads that cannot be quantised.
    """
    rows = sum(entry.nbytes(tokens, kv_bits, itemsize) for entry in layout if isinstance(entry, Rows) and entry.owned)
    return rows + sum(entry.nbytes(block, itemsize) for entry in layout if isinstance(entry, Recurrence))


def kv_read(layout: Layout, tokens: int, kv_bits: int | None = None, itemsize: int = 2) -> int:
    """What one token's pass reads of it: every slot of a buffer, once for each layer that attends to it."""
    return sum(
        entry.readers * entry.nbytes(tokens, kv_bits, itemsize)
        if isinstance(entry, Rows)
        else entry.nbytes(0, itemsize)
        for entry in layout
    )


@dataclass(frozen=True)
class Weights:
    """The weights of a network."""

    nbytes: int
    read: int  # for one token: everything but tables in which a row is looked up, and of experts the chosen ones
    output: int  # of these, what the output head reads
    routed: int  # of these, what the chosen experts read
    parameters: int
    active: int  # parameters that take part in a token
    experts: int  # in each mixture
    chosen: int

    def block(self, rows: int, overlap: float) -> float:
        """Bytes that a block of rows reads: other rows may choose other experts.

        `overlap` is how much smaller the union is than that of independent choices.
        """
        if not self.experts or rows == 1:
            return self.read
        share = self.chosen / self.experts
        union = self.experts * (1 - (1 - share) ** rows) / self.chosen
        return self.read - self.routed + self.routed * max(1.0, union * (1 - overlap))


def weights(network: nn.Module, traffic: Traffic) -> Weights:
    """Told from the shapes of its parameters; nothing is computed."""
    modules: Mapping[str, nn.Module] = dict(network.named_modules())
    parameters: dict[str, mx.array] = dict(tree_flatten(network.parameters()))
    sums = dict.fromkeys(("nbytes", "read", "output", "routed", "parameters", "active"), 0.0)
    experts = 0
    for name, array in parameters.items():
        path, _, kind = name.rpartition(".")
        module = modules[path]
        size, share = _logical(module, kind, array), _share(module, path, traffic)
        sums["nbytes"] += array.nbytes
        sums["read"] += share * array.nbytes
        sums["parameters"] += size
        sums["active"] += share * size
        if path == traffic.output:
            sums["output"] += share * array.nbytes
        if isinstance(module, SwitchLinear | QuantizedSwitchLinear):
            experts = array.shape[0]
            sums["routed"] += share * array.nbytes
    whole = {name: round(value) for name, value in sums.items()}
    return Weights(**whole, experts=experts, chosen=traffic.chosen)


def _share(module: nn.Module, path: str, traffic: Traffic) -> float:
    """How much of a module's parameters one token reads."""
    if isinstance(module, SwitchLinear | QuantizedSwitchLinear):
        return traffic.chosen / module.weight.shape[0]
    if path == traffic.output:
        return traffic.share
    return 0.0 if isinstance(module, nn.Embedding | nn.QuantizedEmbedding) else 1.0


def _logical(module: nn.Module, kind: str, array: mx.array) -> int:
    """Parameters before quantisation: a packed one counts by its scales, which then count for nothing."""
    if not isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding | QuantizedSwitchLinear):
        return array.size
    return array.size * 32 // module.bits if kind == "weight" else 0


def free_bytes() -> int:
    """What of that is not taken by MLX's arrays."""
    return machine_bytes() - int(mx.get_active_memory())


def machine_bytes() -> int:
    """The memory of this machine that MLX may use: on a Mac, what Metal recommends as the most."""
    info = mx.device_info()
    recommended = info.get("max_recommended_working_set_size")
    return int(recommended) if recommended else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
