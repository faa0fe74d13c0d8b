"""mlx-lm's caches as layers of ours, so that our networks run over what its functions keep and hand on."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import mlx.core as mx
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.cache import (
    ArraysCache,
    BatchKVCache,
    BatchRotatingKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
)

from mtp_mlx.cache import Cache, KeyValueCache, QuantisedCache, RecurrentCache, SlidingCache
from mtp_mlx.errors import RequestError
from mtp_mlx.types import Held, LayerCache, Mask, Span, Visible

StockCache = Any  # one of mlx-lm's, which have no type in common that says what they can do

_EVERY_ROW = (KVCache, BatchKVCache, QuantizedKVCache)
_WINDOW = (RotatingKVCache, BatchRotatingKVCache)


def empty(layers: Sequence[LayerCache]) -> list[StockCache]:
    """Empty caches for the layers of a target's own cache, as mlx-lm's model of the family makes them."""
    return [_empty(layer) for layer in layers]


def _empty(layer: LayerCache) -> StockCache:
    if isinstance(layer, RecurrentCache):
        return ArraysCache(size=2)
    if isinstance(layer, SlidingCache):
        return RotatingKVCache(max_size=layer.window, keep=0)
    if isinstance(layer, QuantisedCache):
        return QuantizedKVCache(group_size=layer.group, bits=layer.bits)
    return KVCache()


def over(layers: Sequence[LayerCache], caches: Sequence[StockCache]) -> Cache:
    """A cache that reads and writes mlx-lm's, for one block. What stands behind the layers' own is a drafter's.

    Raises RequestError for caches that were made for another model.
    """
    if len(caches) < len(layers):
        raise RequestError(
            f"the prompt cache has {len(caches)} layers, this model keeps {len(layers)}; "
            "make one with make_prompt_cache(model)"
        )
    return Cache([_over(i, layer, cache) for i, (layer, cache) in enumerate(zip(layers, caches, strict=False))])


def _over(i: int, layer: LayerCache, cache: StockCache) -> LayerCache:
    if isinstance(layer, RecurrentCache):
        _check(i, cache, (ArraysCache,))
        return StockState(layer.kernel, cache)
    if not isinstance(layer, SlidingCache):
        _check(i, cache, _EVERY_ROW)
        return StockRows(cache)
    _check(i, cache, _WINDOW)
    if cache.max_size != layer.window:
        raise RequestError(
            f"layer {i} of the prompt cache keeps {cache.max_size} tokens, this model's window is {layer.window}; "
            "make one with make_prompt_cache(model)"
        )
    return StockRows(cache)


def _check(i: int, cache: StockCache, fitting: tuple[type, ...]) -> None:
    if not isinstance(cache, fitting):
        raise RequestError(
            f"layer {i} of the prompt cache is a {type(cache).__name__}, this model needs "
            f"{' or '.join(kind.__name__ for kind in fitting)}; make one with make_prompt_cache(model)"
        )


def span(caches: Sequence[StockCache], length: int) -> Span:
    """Where the next `length` tokens stand: an integer, or for each row of a batch its own."""
    offset = next(cache.offset for cache in caches if not isinstance(cache, ArraysCache))
    return Span(offset, length)


class Fetched(NamedTuple):
    """The rows that one of mlx-lm's caches shows, plain or quantised."""

    cache: StockCache
    keys: Any
    values: Any

    def attend(self, queries: mx.array, scale: float, mask: Mask) -> mx.array:
        # A mask may be "causal" too, which mlx-lm's hint leaves out.
        seen = cast(mx.array | None, mask)
        return scaled_dot_product_attention(queries, self.keys, self.values, cache=self.cache, scale=scale, mask=seen)


class StockRows(KeyValueCache):
    """Keys and values of one layer in a cache of mlx-lm's. What is written there is kept."""

    def __init__(self, cache: StockCache) -> None:
        super().__init__(0)
        self._cache = cache

    def reserve(self, rows: int) -> None:
        """It grows as it is written."""

    def write(self, keys: mx.array, values: mx.array, span: Span) -> Visible:
        return Fetched(self._cache, *self._cache.update_and_fetch(keys, values))

    def mask(self, span: Span) -> Mask:
        if isinstance(self._cache, BatchRotatingKVCache) and span.length > 1:
            # mlx-lm 0.32.2 counts the padding wrong for a block that follows single tokens in a full ring: a padded
            # text would lose its oldest token. In the order of time, which the write brings about anyway, it is right.
            self._cache._temporal_order()
        return cast(Mask, self._cache.make_mask(span.length, window_size=None, return_array=False))

    def stored(self) -> Visible:
        return Fetched(self._cache, *self._cache.keys_and_values())

    def snapshot(self, start: int, end: int) -> Held:
        raise NotImplementedError("mlx-lm keeps its caches itself")

    def restore(self, held: Held, end: int) -> None:
        raise NotImplementedError("mlx-lm keeps its caches itself")


class StockState(RecurrentCache):
    """Recurrent state of one layer in a cache of mlx-lm's, where rows of a batch may be padded on either side."""

    def __init__(self, kernel: int, cache: ArraysCache) -> None:
        super().__init__(kernel)
        self._cache = cache
        self._real: mx.array | None = None  # (B, L) which of the block's rows are tokens

    def extend(self, rows: mx.array) -> mx.array:
        tail, state = self._cache[0], self._cache[1]
        self.bind([] if tail is None else [tail, state])
        length = rows.shape[1]
        self._real = self._cache.make_mask(length)
        if self._real is not None:
            rows = mx.where(self._real[..., None], rows, 0.0)
        extended = super().extend(rows)
        self._cache[0] = self._tail_of(extended, length)
        return extended

    def _tail_of(self, extended: mx.array, length: int) -> mx.array:
        """What the next block's convolution sees of this one. A copy, so that the block itself can go."""
        reach = mx.arange(self.kernel - 1)
        lengths = self._cache.lengths
        ends = mx.array([length]) if lengths is None else mx.clip(lengths, 0, length)
        return mx.take_along_axis(extended, (ends[:, None] + reach)[..., None], axis=1)

    def recur(self, queries: mx.array, keys: mx.array, values: mx.array, decay: mx.array, beta: mx.array) -> mx.array:
        if self._real is not None:
            # Padding leaves the state as it is.
            real = self._real[..., None]  # (B, L, 1)
            decay, beta = mx.where(real, decay, 1.0), mx.where(real, beta, 0.0)
            keys, values = mx.where(real[..., None], keys, 0.0), mx.where(real[..., None], values, 0.0)
        read = super().recur(queries, keys, values, decay, beta)
        length = keys.shape[1]
        self.commit(length)
        _, self._cache[1] = self.arrays()
        self._cache.advance(length)
        return read
