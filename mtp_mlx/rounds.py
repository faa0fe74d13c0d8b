"""The one loop: draft -> verify -> accept -> commit -> advance, until nobody asks for more.

Plain decoding is the same loop with nothing drafted. A round is built lazily and read once by the host.
"""

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, cast

import mlx.core as mx

from mtp_mlx.accept import accept, normalise
from mtp_mlx.depth import Depth
from mtp_mlx.errors import MTPError
from mtp_mlx.sampling import Sampler
from mtp_mlx.types import Draft, Output, Pair, Span

Progress = Callable[[int, int], None]  # prompt tokens read so far, all prompt tokens

WARM_UP = 2  # rounds whose phases are not timed: kernels are still being built
SPLIT_EVERY = 8  # of the others, one in so many waits between draft and verify to time them apart


class Times(NamedTuple):
    """Seconds of one round. The phases are known only where the round was split to measure them."""

    total: float
    host: float  # building the graph and looking at the result
    draft: float | None
    verify: float | None


class Round(NamedTuple):
    """What one round brought."""

    tokens: list[int]  # the accepted drafts, then one token of the target's own
    drafted: int
    accepted: int
    logprobs: mx.array  # (drafted + 1, V)
    times: Times

    def first(self, n: int) -> "Round":
        """The round as if it had ended with its n-th token: a stop inside an accepted run."""
        return self._replace(tokens=self.tokens[:n], accepted=min(self.accepted, n))


class Sequence:
    """One sequence being decoded: the target's cache, the drafter's state, and the newest token.

    The newest token, `last`, is the only one that is not in the cache yet.
    """

    def __init__(self, pair: Pair, sampler: Sampler):
        self.pair = pair
        self.sampler = sampler
        self.cache = pair.target.make_cache()
        self.state = pair.drafter.start(self.cache)
        self.last = mx.zeros((1,), mx.int32)  # (B,)
        self.length = 0  # tokens in the cache, as the host knows it
        self.ready = False  # whether the drafter has been told of any token yet

    def prefill(self, prompt: list[int], step: int, progress: Progress) -> None:
        """Read a prompt, `step` tokens at a time, up to its last token, which the first round will read."""
        tokens = mx.array(prompt, mx.int32)[None]  # (1, P)
        known = len(prompt) - 1
        self.cache.reserve(len(prompt))
        progress(0, len(prompt))
        for start in range(0, known, step):
            chunk = tokens[:, start : min(start + step, known)]
            length = chunk.shape[1]
            output = self.pair.target(chunk, self.cache, Span(start, length))
            self.cache.commit(length)
            if self.pair.drafter.reads_prompt:
                self._advance(chunk, output, mx.array([length - 1]))
            mx.eval(self.cache.arrays(), self.state)
            mx.clear_cache()
            progress(start + length, len(prompt))
        self.length, self.last = known, tokens[:, -1]

    def round(self, k: int, split: bool = False) -> Round:
        """Draft k tokens and verify them. `split` waits in between, so that the phases can be timed."""
        began = time.perf_counter()
        target, drafter, cache = self.pair.target, self.pair.drafter, self.cache
        cache.reserve(self.length + k + 1)

        draft = drafter.draft(self.state, self.last, k)  # (B, k)
        drafting = _seconds_to_evaluate(draft) if split else 0.0

        block = mx.concatenate([self.last[:, None], draft.tokens], axis=1)  # (B, k+1)
        span = cache.span(k + 1)
        output = target(block, cache, span)
        logprobs = normalise(output.logits)  # (B, k+1, V)
        kept = accept(draft, logprobs, span.positions() + 1, self.sampler)
        cache.commit(kept.count + 1)
        self._advance(block, output, kept.count)
        self.last = mx.take_along_axis(kept.tokens, kept.count[:, None], axis=1)[:, 0]

        # Rows after the first wrong draft continue a text that nobody wrote; they may be as they like.
        finite = mx.isfinite(mx.take_along_axis(logprobs, kept.tokens[..., None], axis=-1))[..., 0]
        healthy = (finite | (mx.arange(k + 1) > kept.count[:, None])).all()
        report = mx.concatenate([kept.count, healthy[None].astype(mx.int32), kept.tokens[0]])
        built = time.perf_counter()
        mx.eval(report, self.last, logprobs, cache.arrays(), self.state)
        verifying = time.perf_counter() - built

        count, sound, *tokens = cast(list[int], report.tolist())  # the one read
        if not sound:
            raise MTPError(
                f"the model's logits after {self.length} tokens are not finite; the checkpoint or its "
                "quantisation is damaged"
            )
        self.length += count + 1
        total = time.perf_counter() - began
        host = total - verifying - drafting
        times = Times(total, host, drafting if split else None, verifying if split else None)
        return Round(tokens[: count + 1], k, count, logprobs[0], times)

    def _advance(self, tokens: mx.array, output: Output, count: mx.array) -> None:
        self.state = self.pair.drafter.advance(self.state, tokens, output, count)
        self.ready = True


def _seconds_to_evaluate(draft: Draft) -> float:
    began = time.perf_counter()
    mx.eval(draft.tokens)
    return time.perf_counter() - began


def rounds(sequence: Sequence, depth: Depth, budget: int) -> Iterator[Round]:
    """Rounds until `budget` tokens have been emitted. The caller stops earlier by not asking again."""
    number = 0
    while budget > 0:
        # Before its first round, a drafter that has not read the prompt has no hidden state to draft from.
        most = min(budget - 1, sequence.pair.drafter.limit) if sequence.ready else 0
        timed = number >= WARM_UP and (number - WARM_UP) % SPLIT_EVERY == 0
        result = sequence.round(min(depth.choose(), most), timed)
        depth.observe(result.drafted, result.accepted, result.times.total)
        budget -= len(result.tokens)
        number += 1
        yield result
