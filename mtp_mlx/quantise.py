"""A drafter's tensors made smaller: affine quantisation whose settings the tensors' own shapes tell."""

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx

from mtp_mlx.errors import RequestError

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
DRAFTER_BITS = (4, 8)  # with less, a drafter guesses so badly that nothing is won
_WEIGHT = ".weight"
# Which expert a token goes to hangs on these, and there is nothing to save: a row for each expert.
_ROUTERS = (".gate.weight", ".shared_expert_gate.weight", ".router.proj.weight")


@dataclass(frozen=True)
class Affine:
    """Affine quantisation, MLX's default kind."""

    bits: int
    group_size: int = 64

    def __post_init__(self) -> None:
        """Raises RequestError for what MLX has no kernels for."""
        if self.bits not in BITS:
            raise RequestError(f"{self.bits} bits are not possible; give one of {', '.join(map(str, BITS))}, or none")
        if self.group_size not in GROUP_SIZES:
            sizes = ", ".join(map(str, GROUP_SIZES))
            raise RequestError(f"a group size of {self.group_size} is not possible; give one of {sizes}")

    def entry(self) -> dict[str, int | str]:
        """As config.json has it."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": "affine"}


def quantised(tensors: Mapping[str, mx.array], how: Affine, name: str) -> dict[str, mx.array]:
    """Tensors with every matrix quantised whose width allows it, lazily; norms and routers stay.

    Raises RequestError where that is none of them.
    """
    kept: dict[str, mx.array] = {}
    for tensor, array in tensors.items():
        if not _fits(tensor, array, how.group_size):
            kept[tensor] = array
            continue
        weight, scales, biases = mx.quantize(array, group_size=how.group_size, bits=how.bits)
        base = tensor.removesuffix(_WEIGHT)
        kept |= {tensor: weight, f"{base}.scales": scales, f"{base}.biases": biases}
    if len(kept) == len(tensors):
        raise RequestError(
            f"{name} has no matrix whose width is a multiple of {how.group_size}; give a smaller --group-size"
        )
    return kept


def is_router(tensor: str) -> bool:
    """Whether a matrix says which experts a token goes to, or how much of one."""
    return f".{tensor}".endswith(_ROUTERS)


def _fits(tensor: str, array: mx.array, group_size: int) -> bool:
    if array.ndim < 2 or not tensor.endswith(_WEIGHT) or is_router(tensor):
        return False
    return mx.issubdtype(array.dtype, mx.floating) and array.shape[-1] % group_size == 0
