"""Which drafted tokens are kept, so that what is emitted has the target's own distribution.

Sample-and-compare, for drafts whose distribution is one-hot (argmax, copies) or that were drawn with the target's
own keys: the target chooses a token at every row of the block as it would have done in plain decoding. A draft is
kept while it equals that choice; the first choice that differs, or the one after the last draft, is the target's
own token. Whatever the drafter proposes, the emitted tokens are the target's own choices, so nothing is lost.

Rejection sampling, for drafts drawn from a known distribution q by chance of their own: a draft d is kept with
probability p(d) / q(d); in place of the first that is not comes a token drawn from what q has too little of,
max(p - q, 0). Every emitted token then has the target's distribution p.
Sources: Leviathan et al. 2023 (arXiv 2211.17192), Chen et al. 2023 (arXiv 2302.01318).
"""

import math

import mlx.core as mx

from mtp_mlx.sampling import RESIDUAL, TEST, Sampler, draw, stream, uniform
from mtp_mlx.types import Draft, Kept


def normalise(logits: mx.array) -> mx.array:
    """Log-probabilities, (..., V). The dtype stays the model's, as in mlx-lm: in bfloat16 the rounding of
    this subtraction decides ties, so that argmax(logits) would be another token now and then."""
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def accept(draft: Draft, logprobs: mx.array, keys: mx.array, sampler: Sampler) -> Kept:
    """Keep the longest right prefix of a draft, (B, k), given the target's rows, (B, k+1, V).

    `keys` (B, k+1, 2) are those of the chosen tokens' positions. Example with k = 3, drafts 5 8 2 and the
    target's choices 5 8 7 4: two are kept and 7 follows, so count = 2 and the valid tokens are 5 8 7.
    """
    if draft.logprobs is None or draft.tokens.shape[1] == 0:
        return _compare(draft.tokens, sampler(logprobs, keys))
    return _reject(draft.tokens, draft.logprobs, sampler.law(logprobs, keys), keys)


def _compare(tokens: mx.array, chosen: mx.array) -> Kept:
    """Drafts (B, k) against the target's choices (B, k+1)."""
    k = tokens.shape[1]
    return Kept(_leading(chosen[:, :k] == tokens), chosen)


def _reject(tokens: mx.array, q: mx.array, p: mx.array, keys: mx.array) -> Kept:
    """Drafts (B, k) drawn from q (B, k, V), for a target with p (B, k+1, V), both in log space."""
    k = tokens.shape[1]
    p_draft, q_draft = _at(p[:, :k], tokens), _at(q, tokens)  # (B, k)
    u = uniform(stream(keys[:, :k], TEST), 1)[..., 0]
    # u may be 0, but its logarithm is not below that of a draft without probability, -inf. A draft that q itself
    # has none for was not drawn from q, so nothing speaks for it.
    right = (mx.log(u) < p_draft - q_draft) & (q_draft > -math.inf)
    count = _leading(right)

    # Row j holds what follows if draft j is the first wrong one; the last row, what follows if none is.
    scores = mx.concatenate([_residual(p[:, :k], q), p[:, k:]], axis=1)
    own = draw(scores, mx.concatenate([stream(keys[:, :k], RESIDUAL), keys[:, k:]], axis=1))  # (B, k+1)
    drafted = mx.concatenate([tokens, own[:, k:]], axis=1)
    return Kept(count, mx.where(mx.arange(k + 1) < count[:, None], drafted, own))


def _residual(p: mx.array, q: mx.array) -> mx.array:
    """Logarithm of max(p - q, 0), not normalised, (B, k, V); p where rounding leaves nothing of it."""
    rest = mx.maximum(mx.exp(p) - mx.exp(q), 0)
    return mx.where(rest.sum(axis=-1, keepdims=True) > 0, mx.log(rest), p)


def _at(rows: mx.array, tokens: mx.array) -> mx.array:
    """The entry of every row (B, k, V) at its token, (B, k)."""
    return mx.take_along_axis(rows, tokens[..., None], axis=-1)[..., 0]


def _leading(right: mx.array) -> mx.array:
    """How many are true before the first that is not, (B, k) -> (B,) int32."""
    if right.shape[1] == 0:
        return mx.zeros(right.shape[:1], mx.int32)
    return mx.cumprod(right.astype(mx.int32), axis=1).sum(axis=1).astype(mx.int32)
