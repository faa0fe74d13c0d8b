"""From log-probabilities to a token, in mlx-lm's order: top-p, min-p, XTC, top-k, temperature last.

Randomness is an argument: a key for every absolute position, made from the seed and that position. So a seeded
run draws the same token at the same place however many tokens were verified at once.
"""

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Protocol

import mlx.core as mx
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

from mtp_mlx.errors import RequestError

# What a position needs randomness for besides the choice of its token, which is made with the key itself.
XTC, DRAFT, TEST, RESIDUAL = range(4)
STREAMS = 4

LOWEST = 2.0**-126  # temperature; what is smaller in float32 counts as 0 on a GPU
SMALLEST = 2.0**-33  # stands for a random number of 0; the next one that can be drawn is 2^-32


class Sampler(Protocol):
    """Chooses one token for every row of a block: a pure function of logits and keys, compiled or not.

    It is hashable, since what it does is compiled into a round.
    """

    def __call__(self, logprobs: mx.array, keys: mx.array) -> mx.array:
        """(B, L, V) log-probabilities and one key a row, (B, L, 2) -> tokens (B, L), int32."""
        ...

    def law(self, logprobs: mx.array, keys: mx.array) -> mx.array:
        """Log-probabilities of what is really drawn from, (B, L, V) float32; -inf where a token is filtered out."""
        ...


@dataclass(frozen=True)
class Greedy:
    """Temperature 0: the most probable token."""

    def __call__(self, logprobs: mx.array, keys: mx.array) -> mx.array:
        return mx.argmax(logprobs, axis=-1).astype(mx.int32)

    def law(self, logprobs: mx.array, keys: mx.array) -> mx.array:
        """All on one token: 0 there, -inf elsewhere, (B, L, V) float32."""
        best = mx.argmax(logprobs, axis=-1, keepdims=True)
        return mx.where(mx.arange(logprobs.shape[-1]) == best, 0.0, -math.inf)


@dataclass(frozen=True)
class Sample:
    """Draws from the filtered distribution. The filters are mlx-lm's and see probabilities at temperature 1.

    A draw adds noise made from the row's key to every token's log-probability and takes the best token. Two
    samplers with the same key share that noise, so they mostly agree where their distributions do: a drafter
    that draws with the target's key is accepted more often, though the target's choice knows nothing of it.
    Source: Daliri, Musco, Suresh 2024, Coupling without communication and drafter-invariant speculative
    decoding (arXiv 2408.07978). Raises RequestError for a value outside its range.
    """

    temperature: float
    _: KW_ONLY
    top_p: float = 1.0  # 0 or 1: off
    min_p: float = 0.0  # 0: off
    min_tokens_to_keep: int = 1  # by min-p
    xtc_probability: float = 0.0  # 0: off
    xtc_threshold: float = 0.1
    xtc_special_tokens: tuple[int, ...] = ()  # never excluded
    top_k: int = 0  # 0: off

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise RequestError(f"temperature {self.temperature} must be a number above 0; 0 is greedy decoding")
        if not 0 <= self.top_p <= 1:
            raise RequestError(f"top-p {self.top_p} must lie in [0, 1]; 0 and 1 turn it off")
        if not 0 <= self.min_p <= 1:
            raise RequestError(f"min-p {self.min_p} must lie in [0, 1]; 0 turns it off")
        if self.min_tokens_to_keep < 1:
            raise RequestError(f"min-p cannot keep {self.min_tokens_to_keep} tokens; the least is 1")
        if not 0 <= self.xtc_probability <= 1:
            raise RequestError(f"XTC probability {self.xtc_probability} must lie in [0, 1]; 0 turns it off")
        if not 0 <= self.xtc_threshold <= 0.5:
            raise RequestError(f"XTC threshold {self.xtc_threshold} must lie in [0, 0.5]")
        if self.top_k < 0:
            raise RequestError(f"top-k {self.top_k} must not be negative; 0 turns it off")

    def __call__(self, logprobs: mx.array, keys: mx.array) -> mx.array:
        return draw(self._scores(logprobs, keys), keys)

    def law(self, logprobs: mx.array, keys: mx.array) -> mx.array:
        """Log-probabilities after filters and temperature, (B, L, V) float32; whether XTC acts is the key's coin."""
        scores = self._scores(logprobs, keys)
        return scores - mx.logsumexp(scores, axis=-1, keepdims=True)

    def _scores(self, logprobs: mx.array, keys: mx.array) -> mx.array:
        rows = self._filtered(logprobs.astype(mx.float32), keys)
        # Against the best token, so that no temperature, however low, turns every row into -inf.
        return (rows - rows.max(axis=-1, keepdims=True)) / max(self.temperature, LOWEST)

    def _filtered(self, logprobs: mx.array, keys: mx.array) -> mx.array:
        V = logprobs.shape[-1]
        if 0 < self.top_p < 1:
            logprobs = apply_top_p(logprobs, self.top_p)
        if self.min_p > 0:
            logprobs = apply_min_p(logprobs, self.min_p, min(self.min_tokens_to_keep, V))
        if self.xtc_probability > 0:
            # mlx-lm flips one coin for a whole block, out of the process's random state.
            coin = uniform(stream(keys, XTC), 1)  # (B, L, 1)
            excluded = (coin <= self.xtc_probability) & self._top_choices(logprobs)
            logprobs = mx.where(excluded, -math.inf, logprobs)
        if 0 < self.top_k < V:
            logprobs = apply_top_k(logprobs, self.top_k)
        return logprobs

    def _top_choices(self, logprobs: mx.array) -> mx.array:
        """What XTC excludes: all tokens above the threshold but the least probable of them, (B, L, V) bool."""
        probabilities = mx.softmax(logprobs, axis=-1)
        above = mx.where(probabilities > self.xtc_threshold, probabilities, math.inf)
        choices = probabilities > above.min(axis=-1, keepdims=True)
        if self.xtc_special_tokens:
            special = mx.arange(logprobs.shape[-1])[:, None] == mx.array(self.xtc_special_tokens)
            choices = choices & ~special.any(axis=-1)
        return choices


def choose_sampler(
    temperature: float,
    top_p: float,
    min_p: float,
    top_k: int,
    *,
    min_tokens_to_keep: int = 1,
    xtc_probability: float = 0.0,
    xtc_threshold: float = 0.1,
    xtc_special_tokens: Sequence[int] = (),
) -> Sampler:
    """The sampler that a user's options mean. Raises RequestError for a value outside its range."""
    # The other options are checked even where greedy decoding does not look at them.
    sample = Sample(
        temperature or 1.0,
        top_p=top_p,
        min_p=min_p,
        min_tokens_to_keep=min_tokens_to_keep,
        xtc_probability=xtc_probability,
        xtc_threshold=xtc_threshold,
        xtc_special_tokens=tuple(xtc_special_tokens),
        top_k=top_k,
    )
    return Greedy() if temperature == 0 else sample


def check_seed(seed: int) -> None:
    """Raises RequestError for a seed that is not one word of a key."""
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise RequestError(f"seed {seed!r} must be a whole number between 0 and {2**32 - 1}")


def keys(seed: mx.array, positions: mx.array) -> mx.array:
    """One threefry key for every absolute position, (B, L) -> (B, L, 2) uint32; seed () or (B,) uint32."""
    seeds = mx.broadcast_to(seed.reshape(-1, 1), positions.shape)
    return mx.stack([seeds.astype(mx.uint32), positions.astype(mx.uint32)], axis=-1)


def stream(keys: mx.array, purpose: int) -> mx.array:
    """Keys for another purpose than the choice of a token, (B, L, 2) -> (B, L, 2); `purpose` is XTC, DRAFT, ...

    They are hashes of the keys, so that no seed and position share theirs with another purpose elsewhere.
    """
    split = mx.vmap(lambda key: mx.random.split(key, STREAMS))(keys.reshape(-1, 2))  # (B * L, STREAMS, 2)
    return split[:, purpose].reshape(keys.shape)


def uniform(keys: mx.array, size: int) -> mx.array:
    """Random numbers in [0, 1), `size` from every key, (B, L, 2) -> (B, L, size) float32."""
    rows = mx.vmap(lambda key: mx.random.uniform(shape=(size,), key=key))(keys.reshape(-1, 2))
    return rows.reshape(*keys.shape[:-1], size)


def draw(scores: mx.array, keys: mx.array) -> mx.array:
    """One token a row with probability softmax(scores), (B, L, V) and (B, L, 2) -> (B, L) int32.

    A score of -inf is never drawn beside a finite one: the noise is finite.
    """
    numbers = mx.maximum(uniform(keys, scores.shape[-1]), SMALLEST)
    # -log(-log(1 - x)) is Gumbel noise as -log(-log(x)) is, and floats are finest near 0, where it is largest.
    noise = -mx.log(-mx.log1p(-numbers))
    return mx.argmax(scores + noise, axis=-1).astype(mx.int32)
