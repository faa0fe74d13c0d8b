"""A pair as a model of mlx-lm's: what its functions and programs call and ask of a model."""

from collections.abc import Mapping
from typing import Any, cast

import mlx.nn as nn

from mtp_mlx.types import Pair


class Model(nn.Module):
    """A target with its drafter, where mlx-lm has a model; its parameters are the target's."""

    def __init__(self, pair: Pair, config: Mapping[str, Any]):
        super().__init__()
        self.target = cast(nn.Module, pair.target)
        self._pair = pair
        self._config = config

    @property
    def pair(self) -> Pair:
        return self._pair
