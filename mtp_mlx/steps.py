"""What a round does on the device, step by step: pure functions of a sequence's cache and of arrays.

Each is traced once and replayed (programs.py). The first arguments are a model, the cache, and what a trace is for.
"""

import mlx.core as mx

from mtp_mlx.cache import Cache
from mtp_mlx.choosing import Context, Group, Pickers, verdict
from mtp_mlx.types import Draft, Drafter, Span, State, Target


def propose(
    drafter: Drafter,
    cache: Cache,
    fixed: tuple[int, tuple[Group, ...], int],
    state: State,
    last: mx.array,
    contexts: list[Context],
) -> tuple[mx.array, list[list[mx.array]]]:
    """k drafts after `last` (B,), and for each group what its own were drawn from if they were drawn by chance."""
    k, groups, vocabulary = fixed
    pick = Pickers(groups, contexts, last, cache.position, k, vocabulary)
    drafter.draft(tuple(state), cache, last, k, pick)
    return pick.tokens(), pick.laws()


def forward(target: Target, cache: Cache, _: None, block: mx.array) -> list[mx.array]:
    """The target reads a block (B, L); logits and hidden."""
    return list(target(block, cache, cache.span(block.shape[1])))


def judge(
    target: Target,
    cache: Cache,
    groups: tuple[Group, ...],
    block: mx.array,
    laws: list[list[mx.array]],
    contexts: list[Context],
) -> tuple[list[tuple[mx.array, mx.array]], mx.array]:
    """The target reads a block, the newest tokens and the drafts, and chooses; for each group its report and
    log-probabilities, and hidden."""
    start = cache.position
    logits, hidden = forward(target, cache, None, block)
    choices = [
        verdict(
            group.rules,
            Context(*context),
            Draft(group.of(block)[:, 1:], *law),
            group.of(block),
            group.of(start),
            group.of(logits),
        )
        for group, law, context in zip(groups, laws, contexts, strict=True)
    ]
    return choices, hidden


def decide(
    target: Target,
    cache: Cache,
    group: Group,
    logits: mx.array,
    block: mx.array,
    law: list[mx.array],
    context: Context,
    masks: list[mx.array],
) -> tuple[mx.array, mx.array]:
    """The choice of `judge` by itself, for a group of texts whose block has been read; tokens may be masked."""
    own = group.of(block)
    draft, start = Draft(own[:, 1:], *law), group.of(cache.position)
    return verdict(group.rules, Context(*context), draft, own, start, group.of(logits), *masks)


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
