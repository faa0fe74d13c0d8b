"""The longest right prefix is kept, and what is emitted has the target's distribution.

Distributions are tested by counting: a target and a drafter over 12 tokens, each a table of logits by the token
before, and the first two tokens of many runs against the enumerated law of plain decoding with mlx-lm.
"""

import math
from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import mlx_lm_processors, needs_compiler
from mlx_lm.sample_utils import (
    apply_min_p,
    apply_top_k,
    apply_top_p,
    apply_xtc,
)

import mtp_mlx.accept as accept_module
from mtp_mlx.accept import accept, normalise
from mtp_mlx.penalties import Penalties, windows
from mtp_mlx.sampling import DRAFT, RESIDUAL, Greedy, Sample, Sampler, draw, keys, stream
from mtp_mlx.types import Draft, Kept

V = 12
RUNS = 100_000
TEXT = [4, 9, 2]  # what every run goes on with
FILTERS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.6},
    "top-p": {"temperature": 1.0, "top_p": 0.8},
    "min-p": {"temperature": 1.2, "min_p": 0.1},
    "top-k": {"temperature": 1.0, "top_k": 4},
    "xtc": {"temperature": 1.0, "xtc_probability": 0.6},
    "all": {"temperature": 1.5, "top_p": 0.9, "min_p": 0.02, "xtc_probability": 0.3, "top_k": 6},
}
PENALTIES = {
    "no penalties": Penalties(),
    "penalties": Penalties(1.4, 3, 0.5, 2, 0.3, 4, ((6, 0.8), (1, -math.inf))),
}

_random = np.random.default_rng(2)
TARGET = mx.array(2 * _random.normal(size=(V, V)), mx.float32)  # logits by the token before
DRAFTER = mx.array(0.7 * np.array(TARGET) + _random.normal(size=(V, V)), mx.float32)
SHARP = Sample(0.7, top_p=0.8).law(normalise(DRAFTER), mx.zeros((V, 2), mx.uint32))  # what it samples from

Proposal = Callable[[mx.array, mx.array, Sampler], tuple[mx.array, mx.array | None]]
Rule = Callable[[Draft, mx.array, mx.array, Sampler], Kept]


# Drafts: what follows `last` (B,), with keys (B, 1, 2) -> token (B, 1) and the log of its distribution (B, 1, V).


def _argmax(last: mx.array, key: mx.array, sampler: Sampler) -> tuple[mx.array, None]:
    return mx.argmax(DRAFTER[last], axis=-1, keepdims=True).astype(mx.int32), None


def _coupled(last: mx.array, key: mx.array, sampler: Sampler) -> tuple[mx.array, None]:
    return sampler(normalise(DRAFTER[last])[:, None], key), None


def _sampled(last: mx.array, key: mx.array, sampler: Sampler) -> tuple[mx.array, mx.array]:
    """With a temperature and filters of the drafter's own."""
    q = SHARP[last][:, None]
    return draw(q, stream(key, DRAFT)), q


def _sampled_alike(last: mx.array, key: mx.array, sampler: Sampler) -> tuple[mx.array, mx.array]:
    """With the target's own sampler and key: its coin for XTC, and the noise that it would choose with itself."""
    q = sampler.law(normalise(DRAFTER[last])[:, None], key)
    return draw(q, key), q


# The same, wrong in ways that are well known.


def _sampled_tested_raw(last: mx.array, key: mx.array, sampler: Sampler) -> tuple[mx.array, mx.array]:
    return _sampled(last, key, sampler)[0], normalise(DRAFTER[last])[:, None]


def _argmax_tested_as_softmax(last: mx.array, key: mx.array, sampler: Sampler) -> tuple[mx.array, mx.array]:
    return _argmax(last, key, sampler)[0], normalise(DRAFTER[last])[:, None]


def _accept_without_subtracting(draft: Draft, logprobs: mx.array, keys: mx.array, sampler: Sampler) -> Kept:
    """After a rejection, a token of the target's distribution as it is."""
    kept = accept(draft, logprobs, keys, sampler)
    own = draw(sampler.law(logprobs, keys), stream(keys, RESIDUAL))
    rejected = mx.arange(own.shape[1]) == mx.where(kept.count < own.shape[1] - 1, kept.count, -1)[:, None]
    return Kept(kept.count, mx.where(rejected, own, kept.tokens))


def _round(
    propose: Proposal,
    rule: Rule,
    sampler: Sampler,
    penalties: Penalties,
    history: mx.array,
    key: mx.array,
) -> Kept:
    """Drafts for texts `history` (B, N), verified; `key` (B, k+1, 2) is of the positions after them."""
    drafts, laws, last = [], [], history[:, -1]
    for j in range(key.shape[1] - 1):
        token, q = propose(last, key[:, j : j + 1], sampler)
        drafts.append(token)
        laws += [] if q is None else [q]
        last = token[:, 0]
    block = mx.concatenate([history[:, -1:], *drafts], axis=1)  # (B, k+1)
    before = history[:, -penalties.reach - 1 : -1]
    logits = penalties(TARGET[block], windows(before, block))
    draft = Draft(block[:, 1:], mx.concatenate(laws, axis=1) if laws else None)
    return rule(draft, normalise(logits), key, sampler)


def _run(propose: Proposal, rule: Rule, sampler: Sampler, penalties: Penalties, runs: int = RUNS) -> np.ndarray:
    """The first two tokens of many runs that differ in their seed, (runs, 2)."""
    key = keys(mx.arange(runs, dtype=mx.uint32), mx.broadcast_to(mx.arange(50, 53), (runs, 3)))
    text = [-1] * penalties.reach + TEXT
    history = mx.broadcast_to(mx.array(text, mx.int32), (runs, len(text)))
    kept = _round(propose, rule, sampler, penalties, history, key)
    tokens = np.array(kept.tokens[:, :2])
    # Where the first draft was wrong, the second token is another round's, with keys that this one has used.
    short = mx.array(np.flatnonzero(np.array(kept.count) == 0))
    longer = mx.concatenate([history, kept.tokens[:, :1]], axis=1)[short]
    again = _round(propose, rule, sampler, penalties, longer, key[short, 1:])
    tokens[np.array(short), 1] = np.array(again.tokens[:, 0])
    return tokens


def _by_mlx_lm(options: dict[str, Any], penalties: Penalties, text: list[int]) -> np.ndarray:
    """The distribution (V,) of plain decoding's next token."""
    row = mx.array(TARGET[text[-1]])[None]
    for processor in mlx_lm_processors(penalties):
        row = processor(mx.array(text), row)
    row = normalise(row)
    row = apply_top_p(row, options["top_p"]) if "top_p" in options else row
    row = apply_min_p(row, options["min_p"]) if "min_p" in options else row
    coin = options.get("xtc_probability", 0.0)
    law = np.zeros(V)
    for weight, branch in (1 - coin, row), (coin, apply_xtc(row, 1.0, 0.1, []) if coin else row):
        kept = apply_top_k(branch, options["top_k"]) if "top_k" in options else branch
        scores = np.array(kept[0], np.float64) / options["temperature"]
        law += weight * np.exp(scores) / np.exp(scores).sum()
    return law


@cache
def _law(filters: str, penalties: str) -> np.ndarray:
    """The joint distribution of the first two tokens, (V, V)."""
    options, changes = FILTERS[filters], PENALTIES[penalties]
    first = _by_mlx_lm(options, changes, TEXT)
    seconds = [_by_mlx_lm(options, changes, [*TEXT, token]) for token in range(V)]
    law: np.ndarray = first[:, None] * np.stack(seconds)
    return law


def _agrees(tokens: np.ndarray, law: np.ndarray) -> bool:
    """Whether the first token and the pair are as far from the law as chance alone takes them.

    The total variation of RUNS true draws is simulated 200 times; its mean and 5 standard deviations are the bound.
    """
    random = np.random.default_rng(0)
    pairs = np.bincount(tokens @ [V, 1], minlength=V * V).reshape(V, V)
    if pairs[law == 0].any():
        return False
    for counts, p in (pairs.sum(axis=1), law.sum(axis=1)), (pairs.flatten(), law.flatten()):
        chance = np.abs(random.multinomial(RUNS, p / p.sum(), 200) / RUNS - p).sum(axis=1) / 2
        if np.abs(counts / RUNS - p).sum() / 2 > chance.mean() + 5 * chance.std():
            return False
    return True


@pytest.mark.parametrize(
    ("propose", "filters", "penalties"),
    [
        *product([_argmax, _coupled, _sampled], FILTERS, ["no penalties"]),
        *product([_sampled_alike], ["temperature", "xtc"], ["no penalties"]),
        *product([_argmax, _coupled, _sampled, _sampled_alike], ["all"], ["penalties"]),
    ],
)
def test_emitted_tokens_have_the_law_of_plain_decoding(propose: Proposal, filters: str, penalties: str) -> None:
    tokens = _run(propose, accept, Sample(**FILTERS[filters]), PENALTIES[penalties])
    assert _agrees(tokens, _law(filters, penalties))


@pytest.mark.parametrize(
    ("propose", "rule"),
    [
        (_sampled_tested_raw, accept),
        (_argmax_tested_as_softmax, accept),
        (_sampled, _accept_without_subtracting),
    ],
)
def test_counting_finds_the_known_wrong_variants(propose: Proposal, rule: Rule) -> None:
    tokens = _run(propose, rule, Sample(**FILTERS["temperature"]), Penalties())
    assert not _agrees(tokens, _law("temperature", "no penalties"))


def test_counting_finds_penalties_that_ignore_the_drafts() -> None:
    """As if every row of a block had the text before the block."""
    changes = PENALTIES["penalties"]

    def blind(draft: Draft, logprobs: mx.array, keys: mx.array, sampler: Sampler) -> Kept:
        B, k = draft.tokens.shape
        block = mx.concatenate([mx.full((B, 1), TEXT[-1]), draft.tokens], axis=1)
        before = mx.array([-1] * (changes.reach - len(TEXT)) + TEXT)
        recent = mx.broadcast_to(before, (B, k + 1, changes.reach))
        return accept(draft, normalise(changes(TARGET[block], recent)), keys, sampler)

    tokens = _run(_argmax, blind, Sample(**FILTERS["temperature"]), Penalties())
    assert not _agrees(tokens, _law("temperature", "penalties"))


@pytest.mark.parametrize("filters", FILTERS)
def test_compared_drafts_never_change_the_text(filters: str) -> None:
    sampler, penalties = Sample(**FILTERS[filters]), PENALTIES["penalties"]
    texts = [_run(propose, accept, sampler, penalties, 5_000) for propose in (_argmax, _coupled)]
    assert (texts[0] == texts[1]).all()


def test_greedy_text_does_not_depend_on_sampled_drafts() -> None:
    changes = PENALTIES["penalties"]
    first = _by_mlx_lm({"temperature": 0.01}, changes, TEXT).argmax()
    second = _by_mlx_lm({"temperature": 0.01}, changes, [*TEXT, int(first)]).argmax()
    assert (_run(_sampled, accept, Greedy(), changes, 5_000) == [first, second]).all()


def _choices(sampler: Sampler, scale: float) -> tuple[np.ndarray, ...]:
    """p, q, and RUNS choices of target and drafter with the same keys; a small scale makes both flat."""
    key = keys(mx.array(3, mx.uint32), mx.arange(RUNS)[None])
    rows = [mx.broadcast_to(normalise(scale * table[0]), (1, RUNS, V)) for table in (TARGET, DRAFTER)]
    laws = [np.array(mx.exp(sampler.law(row[:, :1], key[:, :1]))[0, 0], np.float64) for row in rows]
    return *laws, *(np.array(sampler(row, key)[0]) for row in rows)


@pytest.mark.parametrize("scale", [0.2, 1.0, 3.0])
@pytest.mark.parametrize("top_p", [0.8, 1.0])
def test_coupled_drafts_agree_as_often_as_promised(scale: float, top_p: float) -> None:
    """Exactly sum_i 1 / sum_j max(p_j / p_i, q_j / q_i), which is at least (1 - TV) / (1 + TV)."""
    p, q, ours, drafts = _choices(Sample(1.0, top_p=top_p), scale)
    both = [i for i in range(V) if p[i] > 0 and q[i] > 0]
    expected = sum(1 / np.maximum(p / p[i], q / q[i]).sum() for i in both)
    distance = np.abs(p - q).sum() / 2
    noise = 5 * np.sqrt(expected * (1 - expected) / RUNS)
    assert expected >= (1 - distance) / (1 + distance)
    assert abs((ours == drafts).mean() - expected) < noise


def test_coupled_drafts_beat_argmax_drafts_where_the_target_is_flat() -> None:
    p, q, ours, drafts = _choices(Sample(1.0), 0.2)
    assert p.max() < 0.2, "not flat"
    assert (ours == drafts).mean() > 2 * (ours == q.argmax()).mean()


def _logprobs_choosing(tokens: list[int]) -> mx.array:
    return normalise(5.0 * (mx.arange(V) == mx.array(tokens)[:, None]).astype(mx.float32))[None]


def _keys(rows: int, batch: int = 1) -> mx.array:
    return keys(mx.arange(batch, dtype=mx.uint32), mx.broadcast_to(mx.arange(rows), (batch, rows)))


@pytest.mark.parametrize("right", list(product([True, False], repeat=3)))
@pytest.mark.parametrize("sampled", [False, True])
def test_every_pattern_of_right_and_wrong_drafts(right: tuple[bool, ...], sampled: bool) -> None:
    """Of a greedy target, with drafts as they come and with drafts drawn from a distribution."""
    chosen = [1, 4, 2, 5]
    drafts = [token if ok else (token + 1) % V for token, ok in zip(chosen, right, strict=False)]
    q = normalise(mx.zeros((1, 3, V))) if sampled else None
    kept = accept(Draft(mx.array([drafts]), q), _logprobs_choosing(chosen), _keys(4), Greedy())
    expected = next((i for i, ok in enumerate(right) if not ok), 3)
    assert kept.count.tolist() == [expected] and kept.count.dtype == mx.int32
    assert kept.tokens[0, : expected + 1].tolist() == chosen[: expected + 1] and kept.tokens.dtype == mx.int32


@pytest.mark.parametrize("sampled", [False, True])
def test_nothing_drafted_keeps_one_token(sampled: bool) -> None:
    empty = Draft(mx.zeros((1, 0), mx.int32), mx.zeros((1, 0, V)) if sampled else None)
    kept = accept(empty, _logprobs_choosing([3]), _keys(1), Greedy())
    assert kept.count.tolist() == [0] and kept.tokens.tolist() == [[3]]


def test_the_bonus_after_all_drafts_is_plain_decodings_choice() -> None:
    """Drafts drawn from the target's own law are all kept; then comes what the key itself chooses."""
    B, sampler = 1000, Sample(1.0, top_p=0.9)
    logprobs, key = mx.broadcast_to(normalise(TARGET[:3]), (B, 3, V)), _keys(3, B)
    q = sampler.law(logprobs[:, :2], key[:, :2])
    kept = accept(Draft(draw(q, stream(key[:, :2], DRAFT)), q), logprobs, key, sampler)
    assert (kept.count == 2).all()
    assert (kept.tokens[:, 2] == sampler(logprobs, key)[:, 2]).all()


@pytest.mark.parametrize("u", [0.0, 1 - 2.0**-24])
def test_extreme_random_numbers(u: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With u = 0 every draft is kept but one without probability; with u next to 1 only p >= q is kept."""
    monkeypatch.setattr(accept_module, "uniform", lambda keys, size: mx.full((*keys.shape[:-1], size), u))
    p = [0.5, 0.25, 0.125, 0.125, 0.0]
    q = [0.5, 0.125, 0.25, 0.0, 0.125]
    kept = [
        accept(
            Draft(mx.array([[token]]), mx.log(mx.array([[q]]))),
            mx.log(mx.array([[p, p]])),
            _keys(2),
            Sample(1.0),
        ).count.item()
        for token in range(5)
    ]
    # A token that q cannot draw is not kept either: such a draft was not drawn from q.
    assert kept == [1, 1, 1 if u == 0 else 0, 0, 0]


@pytest.mark.parametrize("filters", ["top-p", "min-p", "top-k", "xtc", "all"])
def test_a_draft_that_the_filters_exclude_is_never_kept(filters: str) -> None:
    B, sampler = 2000, Sample(**FILTERS[filters])
    logprobs, key = mx.broadcast_to(normalise(TARGET[:1]), (B, 2, V)), _keys(2, B)
    law = sampler.law(logprobs, key)
    q = normalise(mx.zeros((B, 1, V)))
    excluded = 0
    for token in range(V):
        kept = accept(Draft(mx.full((B, 1), token, mx.int32), q), logprobs, key, sampler)
        impossible = mx.isinf(law[:, 0, token])
        excluded += bool(impossible.any())
        assert not (impossible & (kept.count > 0)).any()
        assert not (impossible & (kept.tokens[:, 0] == token)).any()
    assert excluded > 0, "nothing is filtered, so the test shows nothing"


def test_a_residual_without_mass_falls_back_to_the_target() -> None:
    """q has all of its mass where p has all of its own, and yet another token comes as a draft."""
    sure = mx.where(mx.arange(V) == 3, 0.0, -100.0)[None, None]  # e^-100 is 0 in float32
    logprobs = mx.concatenate([sure, sure], axis=1)
    kept = accept(Draft(mx.array([[7]]), sure + 50 * (mx.arange(V) == 7)), logprobs, _keys(2), Sample(1.0))
    assert kept.count.tolist() == [0] and kept.tokens[0, 0].item() == 3


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_broken_draft_distribution_keeps_nothing_and_chooses_from_the_target(value: float) -> None:
    drafts = Draft(mx.array([[7, 7]]), mx.full((1, 2, V), value))
    kept = accept(drafts, _logprobs_choosing([1, 4, 2]), _keys(3), Sample(0.01))
    assert kept.count.tolist() == [0] and kept.tokens[0, 0].item() == 1


@needs_compiler
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("propose", "sampler"),
    [(_sampled, Greedy()), (_coupled, Sample(**FILTERS["all"])), (_sampled, Sample(**FILTERS["all"]))],
)
def test_compiled_equals_uncompiled(propose: Proposal, sampler: Sampler) -> None:
    def step(history: mx.array, position: mx.array) -> tuple[mx.array, mx.array]:
        key = keys(mx.array(9, mx.uint32), position + mx.arange(1500).reshape(500, 3))
        kept = _round(propose, accept, sampler, PENALTIES["penalties"], history, key)
        return kept.count, kept.tokens

    history = mx.array(np.random.default_rng(4).integers(0, V, (500, 6)), mx.int32)
    for plain, compiled in zip(step(history, mx.array(70)), mx.compile(step)(history, mx.array(70)), strict=True):
        assert (plain == compiled).all()


def test_greedy_breaks_ties_like_mlx_lm() -> None:
    """In bfloat16 the subtraction of logsumexp makes ties that argmax of the logits does not have."""
    mx.random.seed(3)
    logits = (mx.random.normal((400, 300)) * 0.5).astype(mx.bfloat16)
    theirs = mx.stack([mx.argmax(row - mx.logsumexp(row, keepdims=True)) for row in logits])
    ours = Greedy()(normalise(logits[None]), _keys(400))[0]
    assert (ours == theirs).all()
    assert not (mx.argmax(logits, axis=-1) == theirs).all(), "the sample has no tie, so the test shows nothing"
