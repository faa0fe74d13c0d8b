"""What a round does on the device, step by step: pure functions of a sequence's cache and of arrays.

Each is traced once and replayed (programs.py). The first arguments are a model, the cache, and what a trace is for.
"""

import mlx.core as mx

from mtp_mlx.cache import Cache
from mtp_mlx.choosing import Context, Picker, Rules, verdict
from mtp_mlx.types import Draft, Drafter, Span, State, Target


def propose(
    drafter: Drafter, cache: Cache, fixed: tuple[int, Rules, int], state: State, last: mx.array, context: Context
) -> list[mx.array]:
    """k drafts after `last` (B,), and what each was drawn from if they were drawn by chance."""
    k, rules, vocabulary = fixed
    pick = Picker(rules, Context(*context), last, cache.position, k, vocabulary)
    drafter.draft(tuple(state), cache, last, k, pick)
    return [array for array in pick.draft() if array is not None]


def forward(target: Target, cache: Cache, _: None, block: mx.array) -> list[mx.array]:
    """The target reads a block (B, L); logits and hidden."""
    return list(target(block, cache, cache.span(block.shape[1])))


def judge(
    target: Target, cache: Cache, rules: Rules, block: mx.array, laws: list[mx.array], context: Context
) -> list[mx.array]:
    """The target reads a block, the newest token and the drafts, and chooses; report, log-probabilities and hidden."""
    start = cache.position
    logits, hidden = forward(target, cache, None, block)
    return [*verdict(rules, Context(*context), Draft(block[:, 1:], *laws), block, start, logits), hidden]


def decide(
    target: Target,
    cache: Cache,
    rules: Rules,
    logits: mx.array,
    block: mx.array,
    laws: list[mx.array],
    context: Context,
    masks: list[mx.array],
) -> list[mx.array]:
    """The choice of `judge` by itself, for rows that the target has read and of which tokens may be masked."""
    draft = Draft(block[:, 1:], *laws)
    return list(verdict(rules, Context(*context), draft, block, cache.position, logits, *masks))


def keep(
    drafter: Drafter,
    cache: Cache,
    fixed: tuple[bool, bool, int | None],
    state: State,
    tokens: mx.array,
    hidden: mx.array,
    kept: mx.array,
) -> State:
    """The drafter learns of the kept rows (B,) of a block, the cache keeps them; the drafter's state."""
    everything, told, start = fixed
    span = Span(cache.position if start is None else start, tokens.shape[1])
    if told:
        state = drafter.advance(tuple(state), cache, tokens, span, hidden, kept - 1)
    # A recurrent layer has nothing to do again where it is known beforehand that all rows are kept.
    cache.commit(span.length if everything else kept)
    return state
