"""What of a network is one machine's where several compute it together: heads, and channels of what lies between.

Each machine multiplies with its rows of the matrices that lead in and its columns of the one that leads out, and the
results are added up (Shoeybi et al. 2019, arXiv 1909.08053). Every machine sees the same residual stream.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

Total = Callable[[mx.array], mx.array]  # what one machine has computed -> the sum over all machines
WIDTHS = (64, 32, 16, 8, 4, 2, 1)  # channels that are best kept together: kernels work on tiles


def alone(x: mx.array) -> mx.array:
    """The sum over the only machine."""
    return x


class Heads(NamedTuple):
    """Which heads of an attention layer are one machine's."""

    queries: range
    keys: range


@dataclass(frozen=True, eq=False)
class Part:
    """Which part of every layer is this machine's."""

    rank: int
    size: int  # machines
    total: Total = alone

    def of(self, length: int, step: int = 1) -> range | None:
        """Its part of so many rows, cut at multiples of `step`; None where there are too few for all machines."""
        units, rest = divmod(length, step)
        if rest or units < self.size:
            return None
        return range(units * self.rank // self.size * step, units * (self.rank + 1) // self.size * step)

    def inner(self, down: nn.Module) -> range | None:
        """Its part of the channels between two matrices, of which `down` is the second."""
        width, step = inputs(down), packed(down)
        fitting = [w for w in WIDTHS if w % step == 0 and width % w == 0 and width // w >= self.size]
        even = [w for w in fitting if width // w % self.size == 0]
        return self.of(width, [*even, *fitting, step][0])

    def heads(self, queries: int, keys: int, size: int, out: nn.Module) -> Heads | None:
        """Its heads, of `size` channels each; `out` is the matrix behind them.

        More machines than KV heads: those that have one in common hold it each, and a part of its queries.
        """
        shared, step = queries // keys, packed(out) // math.gcd(packed(out), size)
        own = self.of(keys, math.lcm(shared, step) // shared)
        if own is not None:
            return Heads(times(own, shared), own)
        each, rest = divmod(self.size, keys)  # machines for each KV head
        if rest or not each:
            return None
        key, rank = divmod(self.rank, each)
        some = Part(rank, each).of(shared, step)
        return None if some is None else Heads(moved(some, key * shared), range(key, key + 1))


def times(part: range, factor: int) -> range:
    """The channels of some heads."""
    return range(part.start * factor, part.stop * factor)


def moved(part: range, by: int) -> range:
    return range(part.start + by, part.stop + by)


def keep_rows(matrix: nn.Module, *own: range) -> None:
    """Leave of a matrix the rows that give these outputs, one range after the other."""
    for name, array in _arrays(matrix).items():
        matrix[name] = cut(array, array.ndim - 2, *own)


def keep_columns(matrix: nn.Module, own: range) -> None:
    """Leave of a matrix the columns that these inputs are multiplied with."""
    width = inputs(matrix)
    for name, array in _arrays(matrix).items():
        scale = lambda channel, stored=array.shape[-1]: channel * stored // width  # noqa: E731
        matrix[name] = cut(array, array.ndim - 1, range(scale(own.start), scale(own.stop)))


def keep_inner(part: Part, *mlps: nn.Module) -> Total:
    """Leave of gated MLPs, or of every expert of a mixture, this machine's channels between their matrices.

    Returns what their sum needs. They are added up together, so all stay whole where one of them cannot be cut.
    """
    inner = [part.inner(mlp.down_proj) for mlp in mlps]
    if None in inner:
        return alone
    for mlp, own in zip(mlps, inner, strict=True):
        assert own is not None
        keep_rows(mlp.gate_proj, own)
        keep_rows(mlp.up_proj, own)
        keep_columns(mlp.down_proj, own)
    return part.total


def cut(array: mx.array, axis: int, *own: range) -> mx.array:
    """A copy of some slices, so that the whole need not stay in memory for them."""
    pieces = [array[(slice(None),) * axis + (slice(part.start, part.stop),)] for part in own]
    return mx.contiguous(mx.concatenate(pieces, axis=axis))


def inputs(matrix: nn.Module) -> int:
    """The number of inputs, however they are packed."""
    _arrays(matrix)
    width = matrix.scales.shape[-1] * matrix.group_size if "scales" in matrix else matrix.weight.shape[-1]
    return int(width)


def packed(matrix: nn.Module) -> int:
    """How many inputs share a scale, and so must stay together."""
    return int(matrix.group_size) if "scales" in matrix else 1


def _arrays(matrix: nn.Module) -> dict[str, mx.array]:
    """What can be cut. Raises ValueError for a matrix of another kind, which is not known to be a plain product."""
    known = isinstance(matrix, nn.Linear | nn.QuantizedLinear | SwitchLinear | QuantizedSwitchLinear)
    if not known or "bias" in matrix:
        raise ValueError(f"a {type(matrix).__name__} {'with' if 'bias' in matrix else 'without'} a bias cannot be cut")
    parameters: dict[str, mx.array] = matrix.parameters()
    return {name: parameters[name] for name in ("weight", "scales", "biases") if name in parameters}
