"""The one loop: draft -> verify -> accept -> commit -> advance, until nobody asks for more.

Plain decoding is the same loop with nothing drafted. A round is built lazily and read once by the host.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import mlx.core as mx

from mtp_mlx.accept import accept, normalise
from mtp_mlx.depth import Depth
from mtp_mlx.errors import MTPError
from mtp_mlx.sampling import Sampler
from mtp_mlx.types import Output, Pair, Span

Progress = Callable[[int, int], None]  # prompt tokens read so far, all prompt tokens

WARM_UP = 2  # rounds whose phases are not timed: kernels are still being built
SPLIT_EVERY = 8  # of the others, one in so many waits between draft and verify to time them apart


class Times(NamedTuple):
    """Seconds of one round. The phases are known only where the round was split to measure them."""

    total: float
    host: float  # building the graph and looking at the result
    commit: float | None  # what keeping a part of the block before costs caches and drafter
    draft: float | None
    verify: float | None


class Round(NamedTuple):
    """What one round brought."""

    tokens: list[int]  # the accepted drafts, then one token of the target's own
    drafted: int
    accepted: int
    likely: bool  # whether the first draft was the target's most probable token, whatever was drawn
    logprobs: mx.array  # (drafted + 1, V)
    times: Times

    def first(self, n: int) -> "Round":
        """The round as if it had ended with its n-th token: a stop inside an accepted run."""
        return self._replace(tokens=self.tokens[:n], accepted=min(self.accepted, n))


class _Block(NamedTuple):
    """Rows that the target has read and nobody has committed yet."""

    tokens: mx.array  # (B, L)
    span: Span
    output: Output
    kept: int  # how many of the rows are to be committed


class Sequence:
    """One sequence being decoded: the target's cache, the drafter's state, and the newest token.

    The newest token, `last`, is the only one that no block has read yet. The rows of the newest block are
    committed when the next one is begun; until then `keep` can still cut it shorter.
    """

    def __init__(self, pair: Pair, sampler: Sampler):
        self.pair = pair
        self.sampler = sampler
        self.cache = pair.target.make_cache()
        self.state = pair.drafter.start(self.cache)
        self.last: mx.array | None = None  # (B,)
        self.length = 0  # tokens before `last`
        self.ready = False  # whether the drafter has been told of the token before `last`
        self._block: _Block | None = None

    def prefill(self, prompt: list[int], step: int, progress: Progress) -> None:
        """Read a prompt, or what follows in a conversation, up to its last token, which the first round will read.

        `step` tokens are read at a time.
        """
        self._commit()
        tokens = mx.array(prompt, mx.int32)[None]  # (1, P)
        if self.last is not None:
            tokens = mx.concatenate([self.last[:, None], tokens], axis=1)
        known = tokens.shape[1] - 1
        self.cache.reserve(self.length + known + 1)
        progress(0, len(prompt))
        for start in range(0, known, step):
            chunk = tokens[:, start : min(start + step, known)]
            span = Span(self.length, chunk.shape[1])
            output = self.pair.target(chunk, self.cache, span)
            self.ready = self.pair.drafter.reads_prompt
            self._block = _Block(chunk, span, output, span.length)
            self.length += span.length
            self.last = tokens[:, start + span.length]  # so that reading can be broken off and gone on with
            self._commit()
            mx.eval(self.cache.arrays(), self.state)
            mx.clear_cache()
            progress(start + span.length, len(prompt))
        self.last = tokens[:, -1]

    def round(self, k: int, split: bool = False) -> Round:
        """Draft k tokens and verify them. `split` waits in between, so that the phases can be timed."""
        assert self.last is not None, "a prompt comes first"
        began = time.perf_counter()
        target, drafter, cache = self.pair.target, self.pair.drafter, self.cache
        self._commit()
        committing = _seconds_to_evaluate(cache.arrays(), self.state) if split else 0.0

        cache.reserve(self.length + k + 1)
        draft = drafter.draft(self.state, self.last, k)  # (B, k)
        drafting = _seconds_to_evaluate(draft) if split else 0.0

        block = mx.concatenate([self.last[:, None], draft.tokens], axis=1)  # (B, k+1)
        span = cache.span(k + 1)
        output = target(block, cache, span)
        logprobs = normalise(output.logits)  # (B, k+1, V)
        kept = accept(draft, logprobs, span.positions() + 1, self.sampler)

        # Rows after the first wrong draft continue a text that nobody wrote; their logits may be as they like.
        finite = mx.isfinite(mx.take_along_axis(logprobs, kept.tokens[..., None], axis=-1))[..., 0]
        healthy = (finite | (mx.arange(k + 1) > kept.count[:, None])).all()
        likely = (mx.argmax(logprobs[:, :1], axis=-1) == draft.tokens[:, :1]).any()
        flags = mx.stack([healthy, likely]).astype(mx.int32)
        report = mx.concatenate([kept.count, flags, kept.tokens[0]])
        verifying = _seconds_to_evaluate(report, logprobs, output.hidden, cache.arrays(), self.state)

        count, sound, hit, *tokens = cast(list[int], report.tolist())  # the one read
        if not sound:
            raise MTPError(
                f"the model's logits after {self.length} tokens are not finite; the checkpoint or its "
                "quantisation is damaged"
            )
        self._block = _Block(block, span, output, count + 1)
        self.length += count + 1
        self.last, self.ready = kept.tokens[:, count], True
        total = time.perf_counter() - began
        phases = (committing, drafting, verifying)
        times = Times(total, total - sum(phases), *(phases if split else (None,) * 3))
        return Round(tokens[: count + 1], k, count, bool(hit), logprobs[0], times)

    def keep(self, n: int) -> None:
        """Let the newest round have ended with its n-th token; those after it have never been written."""
        assert self._block is not None and 0 < n <= self._block.kept, f"the newest round has no token {n}"
        tokens, _, _, kept = self._block
        if n < kept:
            self.length -= kept - n
            self.last = tokens[:, n]  # an accepted draft is what the target chose
            self._block = self._block._replace(kept=n)

    def _commit(self) -> None:
        """Keep what is right of the newest block, in the target's cache and in the drafter's state."""
        if self._block is None:
            return
        tokens, span, output, kept = self._block
        # The drafter first: should it fail, the block is still there and nothing has been counted.
        if self.ready:
            self.state = self.pair.drafter.advance(self.state, tokens, span, output, mx.array([kept - 1]))
        self._block = None
        self.cache.commit(kept)


def _seconds_to_evaluate(*arrays: Any) -> float:
    began = time.perf_counter()
    mx.eval(arrays)
    return time.perf_counter() - began


def rounds(sequence: Sequence, depth: Depth, budget: int) -> Iterator[Round]:
    """Rounds until `budget` tokens have been emitted. The caller stops earlier by not asking again."""
    number = 0
    while budget > 0:
        # Before its first round, a drafter that has not read the prompt has no hidden state to draft from.
        most = min(budget - 1, sequence.pair.drafter.limit) if sequence.ready else 0
        timed = number >= WARM_UP and (number - WARM_UP) % SPLIT_EVERY == 0
        result = sequence.round(min(depth.choose(), most), timed)
        depth.observe(result.drafted, result.accepted, result.likely, result.times.total)
        budget -= len(result.tokens)
        number += 1
        yield result
