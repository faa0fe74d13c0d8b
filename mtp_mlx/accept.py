"""Which drafted tokens are kept: sample-and-compare.

The target chooses a token at every row of the block as it would have done in plain decoding. A draft is kept
while it equals that choice; the first choice that differs, or the one after the last draft, is the target's
own token. Whatever the drafter proposes, the emitted tokens are the target's own choices, so nothing is lost.
At temperature 0 this is speculative decoding as in Leviathan et al. 2023 (arXiv 2211.17192).
"""

import mlx.core as mx

from mtp_mlx.sampling import Sampler
from mtp_mlx.types import Draft, Kept


def normalise(logits: mx.array) -> mx.array:
    """Log-probabilities, (..., V). The dtype stays the model's, as in mlx-lm: in bfloat16 the rounding of
    this subtraction decides ties, so that argmax(logits) would be another token now and then."""
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def accept(draft: Draft, logprobs: mx.array, positions: mx.array, sampler: Sampler) -> Kept:
    """Keep the longest right prefix of a draft, (B, k), given the target's rows, (B, k+1, V).

    `positions` (B, k+1) are those of the chosen tokens. Example with k = 3, drafts 5 8 2 and the target's
    choices 5 8 7 4: two are kept and 7 follows, so count = 2 and the valid tokens are 5 8 7.
    """
    chosen = sampler(logprobs, positions)  # (B, k+1)
    k = draft.tokens.shape[1]
    right = (chosen[:, :k] == draft.tokens).astype(mx.int32)
    count = mx.cumprod(right, axis=1).sum(axis=1).astype(mx.int32) if k else mx.zeros_like(chosen[:, 0])
    return Kept(count, chosen)
