"""The longest right prefix is kept, and one token of the target's own follows."""

from itertools import product

import mlx.core as mx
import pytest

from mtp_mlx.accept import accept, normalise
from mtp_mlx.sampling import Greedy
from mtp_mlx.types import Draft

V = 6


def _logprobs_choosing(tokens: list[int]) -> mx.array:
    return normalise(5.0 * (mx.arange(V) == mx.array(tokens)[:, None]).astype(mx.float32))[None]


@pytest.mark.parametrize("right", list(product([True, False], repeat=3)))
def test_every_pattern_of_right_and_wrong_drafts(right: tuple[bool, ...]) -> None:
    chosen = [1, 4, 2, 5]
    drafts = [token if ok else (token + 1) % V for token, ok in zip(chosen, right, strict=False)]
    kept = accept(Draft(mx.array([drafts])), _logprobs_choosing(chosen), mx.arange(4)[None], Greedy())
    expected = next((i for i, ok in enumerate(right) if not ok), 3)
    assert kept.count.tolist() == [expected]
    assert kept.tokens[0, : expected + 1].tolist() == chosen[: expected + 1]


def test_nothing_drafted_keeps_one_token() -> None:
    empty = Draft(mx.zeros((1, 0), mx.int32))
    kept = accept(empty, _logprobs_choosing([3]), mx.zeros((1, 1), mx.int32), Greedy())
    assert kept.count.tolist() == [0] and kept.tokens.tolist() == [[3]]


def test_greedy_breaks_ties_like_mlx_lm() -> None:
    """In bfloat16 the subtraction of logsumexp makes ties that argmax of the logits does not have."""
    mx.random.seed(3)
    logits = (mx.random.normal((400, 300)) * 0.5).astype(mx.bfloat16)
    theirs = mx.stack([mx.argmax(row - mx.logsumexp(row, keepdims=True)) for row in logits])
    ours = Greedy()(normalise(logits[None]), mx.zeros((1, 400), mx.int32))[0]
    assert (ours == theirs).all()
    assert not (mx.argmax(logits, axis=-1) == theirs).all(), "the sample has no tie, so the test shows nothing"
