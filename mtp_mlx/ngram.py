"""A drafter without weights: the one that never drafts."""

from dataclasses import dataclass

import mlx.core as mx

from mtp_mlx.cache import Cache
from mtp_mlx.types import Pick, Span, State


@dataclass(frozen=True)
class NoDrafter:
    """For a target without a known drafter: plain decoding, and copies of earlier text, in the same loop."""

    limit: int = 0
    reads_prompt: bool = False
    nbytes: int = 0

    def kv_bytes(self, tokens: int) -> int:
        return 0

    def reads(self, cache: Cache) -> int:
        return 0

    def start(self, cache: Cache) -> State:
        return ()

    def advance(
        self, state: State, cache: Cache, tokens: mx.array, span: Span, hidden: mx.array, count: mx.array
    ) -> State:
        return ()

    def draft(self, state: State, cache: Cache, last: mx.array, k: int, pick: Pick) -> None:
        assert k == 0, f"asked for {k} drafts, there is no drafter"


NOBODY = NoDrafter()  # one for all: what is traced for it is traced once
