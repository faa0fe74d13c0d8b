"""Drafters without weights. So far only the one that never drafts: plain decoding in the same loop."""

from dataclasses import dataclass

import mlx.core as mx

from mtp_mlx.cache import Cache
from mtp_mlx.types import Draft, Output, Span


@dataclass(frozen=True)
class NoDrafter:
    """For a target without a known drafter."""

    limit: int = 0
    reads_prompt: bool = False
    nbytes: int = 0

    def start(self, cache: Cache) -> None:
        return None

    def advance(self, state: None, tokens: mx.array, span: Span, output: Output, count: mx.array) -> None:
        return None

    def draft(self, state: None, last: mx.array, k: int) -> Draft:
        assert k == 0, f"asked for {k} drafts, there is no drafter"
        return Draft(mx.zeros((last.shape[0], 0), mx.int32))
