"""Tiny models of mlx-lm's, and ours with the same weights in their place."""

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from conftest import float32_copy, mlx_lm_model, tiny_pair

from mtp_mlx.model import Model
from mtp_mlx.types import Pair


@cache
def ours(variant: str) -> Model:
    return Model(Pair(*tiny_pair(variant)), {"model_type": variant})


@cache
def theirs(variant: str) -> nn.Module:
    """mlx-lm's model of the same weights, in float32."""
    with tempfile.TemporaryDirectory() as folder:
        return mlx_lm_model(float32_copy(variant, Path(folder) / variant))


def chunked(model: nn.Module, tokens: mx.array, ends: list[int], caches: list[Any]) -> mx.array:
    """Logits of a text that is read in chunks."""
    parts = [model(tokens[:, a:b], cache=caches) for a, b in zip([0, *ends], ends, strict=False)]
    return mx.concatenate(parts, axis=1)
