"""The two architectures as what the common scripts ask of a family."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bench.demo import gemma, qwen
from bench.demo.training import Rounding, load_model, to_bf16


@dataclass(frozen=True)
class Family:
    """A target and how to read rows of ids with it; ropes and masks are whatever its model takes."""

    target: Callable[[], nn.Module]
    initialise: Callable[[nn.Module, int], None]
    tables: float  # learning rate of the embedding, in proportion to its size
    rounded: Rounding  # weights as released
    ropes: Callable[[Tensor], Any]  # of positions (L,)
    masks: Callable[[int], Any]  # of rows of this length, in training
    past: Callable[[int], Any]  # for a number of tokens; its masks(L) are those of the next L
    hidden: Callable[..., Tensor]  # of (target, ids, ropes, masks, past or nothing): post-norm (B, L, D)

    def load_target(self, out: Path) -> nn.Module:
        """The trained target as released, in fp32."""
        return load_model(self.target(), out / "target", self.rounded)


GEMMA = Family(
    target=gemma.Target,
    initialise=gemma.initialise,
    tables=4e-3,
    rounded=to_bf16,
    ropes=lambda positions: gemma.ropes_at(positions, gemma.TARGET),
    masks=lambda length: gemma.training_masks(length, gemma.TARGET.window),
    past=lambda capacity: gemma.Past(capacity, gemma.TARGET.window),
    hidden=lambda target, *read: target(*read)[0],
)
QWEN = Family(
    target=qwen.Target,
    initialise=qwen.initialise,
    tables=12e-3,
    rounded=qwen.rounded,
    ropes=qwen.rope_table,
    masks=qwen.causal_mask,
    past=qwen.Past,
    hidden=lambda target, *read: target(*read),
)
FAMILIES = {"gemma": GEMMA, "qwen": QWEN}


def family_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--family", choices=FAMILIES, default="gemma")
