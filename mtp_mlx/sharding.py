"""One target over several machines: each reads the checkpoint lazily and keeps its part of the layers only."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import mlx.core as mx
import mlx.nn as nn

from mtp_mlx.checkpoint import Checkpoint
from mtp_mlx.errors import RequestError
from mtp_mlx.models.parts import Part


class Layer(Protocol):
    """A layer that can be cut."""

    def share(self, part: Part) -> None:
        """Keep what is one machine's. Raises ValueError for a matrix that cannot be cut."""
        ...


class Layered(Protocol):
    """A target whose layers can be cut."""

    @property
    def layers(self) -> Sequence[Layer]: ...

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        ...


@dataclass(frozen=True)
class Unread(Checkpoint):
    """A checkpoint that fills a network with promises, of which some will never be read."""

    def _read(self, model: nn.Module) -> None:
        """Not yet: `share` does, once it is known what stays."""

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Unread":
        return cls(checkpoint.folder, checkpoint.config, checkpoint.file)


class Held(NamedTuple):
    """What one machine holds of a target."""

    rank: int
    size: int
    nbytes: int
    whole: int  # bytes of the target on one machine

    def __str__(self) -> str:
        unit, name = (1e9, "GB") if self.whole >= 1e8 else (1e6, "MB")
        held, whole = (f"{count / unit:.1f}" for count in (self.nbytes, self.whole))
        return f"rank {self.rank} of {self.size} holds {held} of the target's {whole} {name}"


def part_of(group: mx.distributed.Group) -> Part:
    """What is this machine's."""
    return Part(group.rank(), group.size(), partial(mx.distributed.all_sum, group=group))


def share(target: Layered, part: Part, name: str) -> Held:
    """Leave of a target's layers what is one machine's, and read it: the rest is in memory for one layer at a time.

    Raises RequestError where nothing can be cut for so many machines, or a matrix is of a kind that cannot be cut.
    """
    whole = target.nbytes
    try:
        for layer in target.layers:
            layer.share(part)
    except ValueError as error:
        raise RequestError(f"{name} cannot be computed by {part.size} machines: {error}; use one machine") from error
    held = Held(part.rank, part.size, target.nbytes, whole)
    if held.nbytes == whole:
        raise RequestError(
            f"nothing of {name} can be shared out among {part.size} machines, as none of its layers has so many KV "
            "heads or so many groups of channels; use fewer machines"
        )
    _read(target)
    return held


def _read(target: Layered) -> None:
    for layer in [*target.layers, target]:
        assert isinstance(layer, nn.Module)
        mx.eval(layer.parameters())
        mx.clear_cache()
