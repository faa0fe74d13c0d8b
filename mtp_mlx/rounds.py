"""The one loop: a round as deep as the policy says, and what is learned of it, until nobody asks for more."""

from collections.abc import Iterator

from mtp_mlx.batch import Batch, Round
from mtp_mlx.cache import MAX_BLOCK
from mtp_mlx.copying import Copies
from mtp_mlx.depth import Depth, Outcome
from mtp_mlx.sequence import Sequence

WARM_UP = 2  # rounds whose phases are not timed: they are still being traced
SPLIT_EVERY = 8  # of the others, one in so many waits between draft and verify to time them apart


def rounds(sequence: Sequence, depth: Depth, budget: int, copies: Copies | None = None) -> Iterator[Round]:
    """Rounds of one text until `budget` tokens have been emitted. The caller stops earlier by not asking again.

    `copies` offers earlier text to be tried in place of the drafter's proposals.
    """
    while budget > 0:
        (result,) = next_round(sequence.batch, depth, budget, [copies])
        if isinstance(result, Exception):
            raise result
        budget -= len(result.tokens)
        yield result


def next_round(batch: Batch, depth: Depth, budget: int, copies: "list[Copies | None]") -> list[Round | Exception]:
    """A round as deep as the policy says, where no text may have more than `budget` further tokens.

    `copies`, for every text, are tried where it is alone, and learn of what was written in any case.
    """
    # Before its first round, a drafter that has not read the prompt has no hidden state to draft from.
    most = budget - 1 if batch.ready or not batch.pair.drafter.limit else 0
    own = copies[0] if len(copies) == 1 else None
    copy = own.propose(min(budget - 1, MAX_BLOCK - 1)) if own else []
    choice = depth.choose(len(copy), most)
    timed = batch.rounds >= WARM_UP and (batch.rounds - WARM_UP) % SPLIT_EVERY == 0
    results = batch.round([copy[: choice.drafts]] if choice.copied else choice.drafts, timed)
    sound = [(result, of) for result, of in zip(results, copies, strict=True) if isinstance(result, Round)]
    if sound:
        seconds = batch.pair.agreed.seconds(sound[0][0].times.total)
        depth.observe(*(Outcome(*result[1:5], seconds) for result, _ in sound))
    for result, of in sound:
        if of:
            of.extend(result.tokens)
        if of and result.copied:
            of.observe(result.drafted, result.accepted)
    return results
