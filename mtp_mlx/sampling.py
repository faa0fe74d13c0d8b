"""From logits to a token, in mlx-lm's order: top-p, min-p, top-k, temperature last.

Every choice is made at an absolute position with a key made from the seed and that position. So a seeded
run draws the same token at the same place however many tokens were verified at once.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

from mtp_mlx.errors import RequestError


class Sampler(Protocol):
    """Chooses one token for every row of a block."""

    def __call__(self, logprobs: mx.array, positions: mx.array) -> mx.array:
        """(B, L, V) log-probabilities of the tokens at `positions` (B, L) -> tokens (B, L), int32."""
        ...


@dataclass(frozen=True)
class Greedy:
    """Temperature 0: the most probable token."""

    def __call__(self, logprobs: mx.array, positions: mx.array) -> mx.array:
        return mx.argmax(logprobs, axis=-1).astype(mx.int32)


@dataclass(frozen=True)
class Sample:
    """Draws from the filtered distribution.

    Raises RequestError for a value outside its range.
    """

    temperature: float
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off
    top_k: int = 0  # 0: off
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise RequestError(f"temperature {self.temperature} must be a number above 0; 0 is greedy decoding")
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top-p {self.top_p} must lie in (0, 1]; 1 turns it off")
        if not 0 <= self.min_p <= 1:
            raise RequestError(f"min-p {self.min_p} must lie in [0, 1]; 0 turns it off")
        if self.top_k < 0:
            raise RequestError(f"top-k {self.top_k} must not be negative; 0 turns it off")
        if not 0 <= self.seed < 2**32:
            raise RequestError(f"seed {self.seed} must lie between 0 and {2**32 - 1}")

    def __call__(self, logprobs: mx.array, positions: mx.array) -> mx.array:
        B, L, V = logprobs.shape
        rows = self._filtered(logprobs.reshape(B * L, V).astype(mx.float32))
        # Against the best token, so that no temperature, however low, turns every row into -inf.
        rows = (rows - rows.max(axis=-1, keepdims=True)) / self.temperature
        flat = positions.reshape(B * L).astype(mx.uint32)
        drawn = [
            mx.random.categorical(rows[i], key=mx.stack([mx.array(self.seed, mx.uint32), flat[i]]))
            for i in range(B * L)
        ]
        return mx.stack(drawn).reshape(B, L).astype(mx.int32)

    def _filtered(self, logprobs: mx.array) -> mx.array:
        if self.top_p < 1:
            logprobs = apply_top_p(logprobs, self.top_p)
        if self.min_p > 0:
            logprobs = apply_min_p(logprobs, self.min_p)
        if 0 < self.top_k < logprobs.shape[-1]:
            logprobs = apply_top_k(logprobs, self.top_k)
        return logprobs


def choose_sampler(temperature: float, top_p: float, min_p: float, top_k: int, seed: int) -> Sampler:
    """The sampler that a user's options mean. Raises RequestError for a value outside its range."""
    # The other options are checked even where greedy decoding does not look at them.
    sample = Sample(temperature or 1.0, top_p, min_p, top_k, seed)
    return Greedy() if temperature == 0 else sample
