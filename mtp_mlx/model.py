"""A pair as a model of mlx-lm's: what its functions and programs call and ask of a model."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from mtp_mlx import stock
from mtp_mlx.errors import RequestError
from mtp_mlx.types import Pair


class Model(nn.Module):
    """A target with its drafter, where mlx-lm has a model; its parameters are the target's.

    Called with tokens it gives the target's logits, over prompt caches of mlx-lm's own. Whoever knows of the drafter
    takes `pair`.
    """

    def __init__(self, pair: Pair, config: Mapping[str, Any]):
        super().__init__()
        self.target = cast(nn.Module, pair.target)
        self._pair = pair
        self._config = dict(config)
        self._kept = pair.make_cache().layers

    @property
    def pair(self) -> Pair:
        return self._pair

    @property
    def model_type(self) -> str:
        return str(self._config.get("model_type", ""))

    @property
    def args(self) -> SimpleNamespace:
        """The entries of the checkpoint's config."""
        return SimpleNamespace(**self._config)

    @property
    def layers(self) -> list[nn.Module]:
        return cast(list[nn.Module], self.target.layers)

    def make_cache(self) -> list[stock.StockCache]:
        """Empty caches of mlx-lm's, those that its own model of the family makes: prompt caches can be exchanged."""
        return stock.empty(self._kept)

    def __call__(
        self,
        inputs: mx.array,
        cache: list[stock.StockCache] | None = None,
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        """Logits (B, L, V) of tokens (B, L) that follow what is in the cache.

        Raises RequestError for a cache of another model, and for embeddings: the target and its drafter look tokens
        up by themselves.
        """
        if input_embeddings is not None:
            raise RequestError("this model takes token ids only; leave the input embeddings (or images) out")
        caches = self.make_cache() if cache is None else cache
        held = stock.over(self._kept, caches)
        return self._pair.target(inputs, held, stock.span(caches, inputs.shape[1])).logits


def pair_of(model: Model | Pair, name: str = "model") -> Pair:
    """The pair of a model that `mtp_mlx.load` or `attach` gave. Raises RequestError for anything else."""
    if isinstance(model, Pair):
        return model
    if not isinstance(model, Model):
        kind = f"{type(model).__module__}.{type(model).__qualname__}"
        raise RequestError(f"{name} is a {kind}; give what mtp_mlx.load returns for it")
    return model.pair
