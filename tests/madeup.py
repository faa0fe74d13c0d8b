"""Snapshots of no model, told by their tokens: rows of three dtypes, a layer without any, a ring and a state."""

import mlx.core as mx
import numpy as np

from mtp_mlx.snapshots import OVERLAP, Part, Snapshot

RING = 8  # tokens


def text(length: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(4, 320, length)]


def made_up(tokens: list[int], base: Snapshot | None = None) -> Snapshot:
    """As `take` would have it, with a base of the same text."""
    seed, length = sum(tokens) + len(tokens), len(tokens)
    start = max(0, base.length - OVERLAP) if base else 0
    earlier = tuple(part for part in base.parts if part.start < start) if base else ()
    shape = (1, 2, length - start)
    rows = [
        [_array((*shape, 4), mx.float32, seed), _array((*shape, 4), mx.bfloat16, seed + 1)],
        [],
        [_array((*shape, 1), mx.uint32, seed + 2)],
    ]
    whole = [[], [_array((1, 2, min(length, RING), 4), mx.float16, seed + 3)], []]
    snapshot = Snapshot(tokens, (*earlier, Part(start, rows)), whole, (_array((1, 1, 8), mx.float32, seed + 4),), True)
    snapshot.compute()
    return snapshot


def _array(shape: tuple[int, ...], dtype: mx.Dtype, seed: int) -> mx.array:
    return (mx.random.uniform(0, 50, shape, key=mx.random.key(seed))).astype(dtype)
