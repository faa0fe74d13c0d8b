"""A drafter in fewer bits: what it guesses may change a little, what is written never does."""

from typing import Literal

import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from mtp_mlx import memory
from mtp_mlx.cache import GROUPS
from mtp_mlx.errors import RequestError
from mtp_mlx.quantise import DRAFTER_BITS, is_router

Bits = int | None | Literal["auto"]  # None: as it is in its file

AUTO = 4
# Of what the target reads for a token: a drafter that reads more than this for a draft costs too much of what it saves.
# bfloat16 assistants read 39 % beside a 4-bit Gemma 26B-A4B, 12 % beside the 12B and 5 % beside the 31B.
SHARE = 0.1


def choose_bits(asked: Bits, target: memory.Network, drafter: memory.Network) -> tuple[int | None, str]:
    """In how many bits to hold a drafter, and why; None as it is. Raises RequestError for what cannot be done."""
    assert isinstance(target, nn.Module) and isinstance(drafter, nn.Module)
    if asked is None:
        return None, ""
    if asked != "auto":
        if asked not in DRAFTER_BITS:
            raise RequestError(f"a drafter cannot be held in {asked} bits; give {' or '.join(map(str, DRAFTER_BITS))}")
        if is_quantised(drafter):
            raise RequestError(f"the drafter is quantised already; leave the {asked} bits out")
        return asked, f"held in {asked} bits as asked"
    if is_quantised(drafter) or not is_quantised(target):
        return None, ""
    share = memory.weights(drafter, drafter.traffic).read / memory.weights(target, target.traffic).read
    if share <= SHARE:
        return None, ""
    return AUTO, f"held in {AUTO} bits, since it would read {share:.0%} of what the target reads for a token"


def is_quantised(network: nn.Module) -> bool:
    """Whether any of its weights are."""
    packed = nn.QuantizedLinear | nn.QuantizedEmbedding | QuantizedSwitchLinear
    return any(isinstance(module, packed) for module in network.modules())


def quantise(network: nn.Module, bits: int) -> None:
    """Quantise what can be, lazily; a matrix whose rows no group divides stays as it is."""

    def settings(path: str, module: nn.Module) -> bool | dict[str, int]:
        if is_router(f"{path}.weight") or not isinstance(module, nn.Linear | nn.Embedding | SwitchLinear):
            return False
        width = module.weight.shape[-1]
        return next(({"group_size": group, "bits": bits} for group in GROUPS if width % group == 0), False)

    nn.quantize(network, class_predicate=settings)
