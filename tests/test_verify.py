"""The proof a user runs: it passes what is right, it explains what rounding does, and it catches what is wrong."""

import json
import math
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import FIXTURES, DialledDrafter, gap, program, tiny_pair, varied_tokens
from mlx_lm.tokenizer_utils import TokenizerWrapper

import mtp_mlx
from mtp_mlx import choosing
from mtp_mlx import verify as verify_module
from mtp_mlx.accept import accept
from mtp_mlx.cache import Cache
from mtp_mlx.cli.verify import PROMPTS, read_prompts
from mtp_mlx.errors import RequestError
from mtp_mlx.generate import stream_generate
from mtp_mlx.generation import Response, encode
from mtp_mlx.ngram import NoDrafter
from mtp_mlx.sampling import Greedy, Sample, Sampler, draw, keys
from mtp_mlx.stats import Stats
from mtp_mlx.types import Draft, Kept, Output, Pair, Span, Target
from mtp_mlx.verify import (
    HARMLESS,
    UNLIKELY,
    Comparison,
    Difference,
    Draws,
    Fit,
    Noise,
    Numerics,
    Plan,
    Report,
    Run,
    chance_of_difference,
    chernoff,
    chi_square_tail,
    compare,
    first_difference,
    proposals,
    reread,
    verify,
)

# As a machine might be that computes in bfloat16: rounding swaps tokens up to half a nat apart.
ROUGH = Numerics("bfloat16", 0.125, (Noise(4, 0.25, 0.09),), Noise(None, 0.2, 0.08))
EXACT = Numerics("float32", 2e-6, (Noise(4, 0.0, 0.0),), Noise(None, 0.0, 0.0))
SAME = Comparison("code", 3, False, 48, 3.0, 44, 32, None, 0.0, 0.0, 0.0, 0)


def difference(gap: float | None, chance: float = 1.0) -> Difference:
    return Difference(17, 5, 6, gap, chance)


def test_equal_texts_are_equal() -> None:
    for numerics in (ROUGH, EXACT):
        report = Report(numerics, (SAME,), ())
        assert report.verdict == "equal" and not report.faults() and report.weakness() is None
        assert report.sentence() == "Output is unchanged: 1 of 1 texts are the same with and without drafts."


def test_a_difference_within_the_measured_rounding_is_a_near_tie() -> None:
    near = replace(SAME, first=difference(0.4), gap=0.4)
    assert near.verdict(ROUGH) == "near-tie" and near.verdict(EXACT) == "fault"
    report = Report(ROUGH, (SAME, near), ())
    assert report.verdict == "near-tie" and report.sentence().startswith("Equal but for 1 near-tie (")
    assert replace(near, first=difference(0.0), gap=0.0).verdict(EXACT) == "near-tie", "two tokens tied to the last bit"


def test_a_larger_difference_is_a_fault_wherever_it_is() -> None:
    far = replace(SAME, first=difference(0.6), gap=0.6)
    later = replace(SAME, first=difference(0.1), gap=0.6)  # after a near-tie, a token that nothing explains
    for wrong in (far, later):
        assert wrong.verdict(ROUGH) == "fault"
        report = Report(ROUGH, (SAME, wrong), ())
        assert report.sentence().startswith("FAULT: code, depth 3: a token 0.6 nats less probable than the best")


def test_a_text_that_goes_on_where_the_other_ends_is_a_fault() -> None:
    assert replace(SAME, first=difference(None, 0.0)).verdict(ROUGH) == "fault"
    assert first_difference([1, 2, 3], [1, 2]) == 2 == first_difference([1, 2], [1, 2, 3])
    assert first_difference([1, 2, 3], [1, 4, 3]) == 1
    assert first_difference([1, 2], [1, 2]) is None


def test_equal_tokens_from_wrong_numbers_are_a_fault() -> None:
    """A cache that holds a rejected token may not flip a token in so short a text."""
    assert replace(SAME, shift=0.3).verdict(ROUGH) == "equal" and replace(SAME, shift=0.4).verdict(ROUGH) == "fault"
    assert replace(SAME, shift=1e-5).verdict(EXACT) == "equal" and replace(SAME, shift=2e-4).verdict(EXACT) == "fault"
    assert replace(SAME, shift=math.nan).verdict(ROUGH) == "fault"


def test_one_wrong_row_among_many_right_ones_is_a_fault() -> None:
    assert replace(SAME, shift=0.02, jump=0.9).verdict(ROUGH) == "equal"
    assert replace(SAME, shift=0.03, jump=1.1).verdict(ROUGH) == "fault"
    assert replace(SAME, jump=math.nan).verdict(ROUGH) == "fault"


def test_a_token_that_is_not_the_choice_from_its_own_row_is_a_fault_however_close() -> None:
    assert replace(SAME, first=difference(0.01), gap=0.01, strays=1).verdict(ROUGH) == "fault"
    assert replace(SAME, drawn=True, strays=1).verdict(ROUGH) == "equal", "noise may be rounded otherwise"
    assert replace(SAME, drawn=True, strays=2).verdict(ROUGH) == "fault"


def test_drawn_texts_may_part_where_rounding_makes_it_likely() -> None:
    for chance, verdict in ((0.3, "near-tie"), (1e-3, "near-tie"), (1e-5, "fault"), (0.0, "fault")):
        assert replace(SAME, drawn=True, first=difference(5.0, chance), gap=9.0).verdict(ROUGH) == verdict


def test_a_fault_cannot_pass_for_rounding() -> None:
    """Tolerances come from measured changes; changes that no rounding makes are faults themselves."""
    assert ROUGH.faults() == EXACT.faults() == []
    block = replace(ROUGH, blocks=(Noise(4, 9.0, 0.5),))
    prompt = replace(ROUGH, prompt=Noise(None, 9.0, 0.7))
    wide = replace(EXACT, blocks=(Noise(2, 1e-2, 1e-3), Noise(4, 0.0, 0.0)))
    broken = replace(ROUGH, blocks=(Noise(4, math.nan, math.nan),))
    for numerics in (block, prompt, wide, broken):
        assert len(numerics.faults()) == 1
        assert Report(numerics, (SAME,), ()).verdict == "fault"
    coarse = Numerics("float32", 2e-6, (Noise(4, 0.02, 0.004),), Noise(None, 0.02, 0.003))
    assert coarse.faults() == [], "products rounded to ten bits, in every grouping of rows"


def fit(p_value: float, strays: int = 0, shift: float = 0.0, classes: int = 5, accepted: int = 300) -> Fit:
    return Fit(960, 20, p_value, classes, strays, shift, shift, 1.5, accepted, ())


def test_the_distribution_is_judged_by_the_last_and_largest_sample() -> None:
    assert Report(ROUGH, (SAME,), (fit(0.4),)).verdict == "equal"
    assert Report(ROUGH, (SAME,), (fit(1e-5), fit(0.2))).verdict == "equal", "a suspicion that more tokens cleared"
    assert Report(ROUGH, (SAME,), (fit(1e-3), fit(1e-6))).verdict == "fault"
    for wrong in (fit(0.4, strays=2), fit(0.4, shift=0.4)):
        assert Report(ROUGH, (SAME,), (wrong,)).verdict == ("fault" if wrong.strays > 1 or wrong.shift else "equal")


def test_what_proves_little_says_so() -> None:
    idle = replace(SAME, accepted=0)
    assert "nothing was accepted" in str(Report(ROUGH, (idle,), (fit(0.4, accepted=0),)).weakness())
    assert Report(ROUGH, (idle,), (fit(0.4),)).weakness() is None
    assert "certain" in str(Report(ROUGH, (SAME,), (fit(1.0, classes=0),)).weakness())


@pytest.mark.parametrize(
    ("x", "freedom", "tail"),
    [(3.841, 1, 0.05), (5.991, 2, 0.05), (7.815, 3, 0.05), (14.067, 7, 0.05), (24.322, 7, 0.001), (0.0, 4, 1.0)],
)
def test_the_chi_square_tail_is_that_of_the_tables(x: float, freedom: int, tail: float) -> None:
    assert chi_square_tail(x, freedom) == pytest.approx(tail, rel=2e-3)
    assert chi_square_tail(5.0, 0) == 1.0


V = 200


def synthetic(rows: int, seed: int, *, certain: float = 0.5) -> np.ndarray:
    """Log-probabilities of a language model's kind: steep, every row another entropy, some rows nearly certain."""
    random = np.random.default_rng(seed)
    scores = random.normal(0, 1, (rows, V)) * random.uniform(0.5, 4, (rows, 1))
    scores[random.random(rows) < certain, 0] += 12
    return normalised(scores)


def normalised(scores: np.ndarray) -> np.ndarray:
    rows: np.ndarray = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    return rows


def mixed(law: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """One token in five is the one chosen in its row, whatever is drawn."""
    return normalised(np.logaddexp(law + math.log(0.8), np.where(chosen, math.log(0.2), -np.inf)))


def drawn(law: np.ndarray, seed: int) -> list[int]:
    noise = np.random.default_rng(seed).gumbel(size=law.shape)
    return [int(token) for token in (law + noise).argmax(axis=1)]


def p_values(law: np.ndarray, wrong: np.ndarray, repeats: int) -> np.ndarray:
    """Of tokens drawn from `wrong`, tested against `law`."""
    device = mx.array(law.astype(np.float32))
    return np.array([Draws.ranked(device, drawn(wrong, seed)).p_value for seed in range(repeats)])


@pytest.mark.parametrize("certain", [0.0, 0.9])
def test_what_is_drawn_rightly_is_seldom_suspicious(certain: float) -> None:
    law = synthetic(600, 1, certain=certain)
    found = p_values(law, law, 200)
    # Twice the smaller of two p-values, one of which is hardly ever small.
    assert 0.03 < (found < 0.2).mean() < 0.2 and (found < 0.02).sum() <= 9 and (found < UNLIKELY).sum() == 0


def test_counts_scatter_around_their_expectation_as_stated() -> None:
    law = synthetic(40, 7, certain=0.0)
    counted = [Draws.ranked(mx.array(law.astype(np.float32)), drawn(law, seed)) for seed in range(2000)]
    seen = np.array([draws.observed for draws in counted])
    assert np.abs(seen.mean(axis=0) - counted[0].expected).max() < 0.4
    assert np.abs(np.cov(seen.T) - counted[0].covariance).max() < 0.1 * counted[0].covariance.max()


def sharper(law: np.ndarray) -> np.ndarray:
    return normalised(law / 0.8)


def believing(law: np.ndarray) -> np.ndarray:
    """Keeps the most probable token too often."""
    return mixed(law, np.arange(V) == law.argmax(axis=1)[:, None])


def second(law: np.ndarray) -> np.ndarray:
    """The same with the second one, which makes tokens neither more nor less probable on average."""
    return mixed(law, np.arange(V) == np.argsort(-law, axis=1)[:, 1:2])


@pytest.mark.parametrize("bias", [sharper, believing, second])
def test_what_is_drawn_wrongly_is_noticed(bias: Callable[[np.ndarray], np.ndarray]) -> None:
    law = synthetic(1500, 2, certain=0.2)
    assert (p_values(law, bias(law), 10) < UNLIKELY).all()


def test_counts_of_two_texts_add_up_to_those_of_both() -> None:
    law = synthetic(300, 3)
    tokens, device = drawn(law, 0), mx.array(law.astype(np.float32))
    parts = Draws.none(8) + Draws.ranked(device[:100], tokens[:100]) + Draws.ranked(device[100:], tokens[100:])
    whole = Draws.ranked(device, tokens)
    assert parts.tokens == 300 and (parts.observed == whole.observed).all()
    assert parts.p_value == pytest.approx(whole.p_value)
    assert whole.observed.sum() == whole.expected.sum() == pytest.approx(300)


def test_drafts_kept_too_often_are_noticed_whatever_their_rank() -> None:
    law = synthetic(800, 8, certain=0.3)
    proposal = normalised(law + np.random.default_rng(9).normal(0, 1, law.shape))
    kept = np.logaddexp(law + math.log(0.7), proposal + math.log(0.3))
    rows = [mx.array(array.astype(np.float32)) for array in (law, proposal)]

    def found(wrong: np.ndarray) -> np.ndarray:
        return np.array([Draws.favoured(rows[0], rows[1], drawn(wrong, seed)).p_value for seed in range(40)])

    right = found(law)
    assert (right < 0.05).sum() <= 6 and (right < UNLIKELY).sum() == 0
    assert (found(kept) < 0.01).all()


def test_filtered_tokens_and_tiny_vocabularies_are_counted() -> None:
    law = Sample(0.9, top_k=5).law(mx.array(synthetic(400, 4)), keys(mx.array(0, mx.uint32), mx.arange(400)[None]))
    counted = Draws.ranked(law, drawn(np.array(law), 0))
    assert counted.observed[4:].sum() == 0 and counted.p_value > 1e-3
    few = Draws.ranked(mx.log(mx.array([[0.5, 0.3, 0.2]] * 100)), drawn(np.log([[0.5, 0.3, 0.2]] * 100), 0))
    assert few.classes == 2 and few.p_value > 1e-3


def test_a_few_tokens_at_the_edge_of_a_filter_are_no_fault_and_many_are() -> None:
    law = Sample(1.0, top_k=4).law(mx.array(synthetic(400, 6)), keys(mx.array(0, mx.uint32), mx.arange(400)[None]))
    tokens, outside = drawn(np.array(law), 0), np.array(law).argmin(axis=1)
    for wrong, suspicious in ((2, False), (20, True)):
        mixed = [int(token) for token in outside[:wrong]] + tokens[wrong:]
        assert (Draws.ranked(law, mixed).p_value < UNLIKELY) == suspicious
    assert chernoff(20, 10) > 1 - sum(math.exp(-10) * 10**i / math.factorial(i) for i in range(20)) > 0.002
    assert chernoff(1, 0.0) == 1.0 and chernoff(3, 8) == 1.0


def test_tokens_that_are_certain_are_not_tested() -> None:
    certain = Draws.ranked(mx.log(mx.array([[1 - 1e-4, 1e-4]] * 50)), [0] * 50)
    assert certain.classes == 0 and certain.p_value == 1.0


def test_the_chance_of_different_draws_is_bounded() -> None:
    law = mx.array(synthetic(1, 5, certain=0.0).astype(np.float32))
    moved = law + 0.2 * mx.random.normal(law.shape, key=mx.random.key(1))
    moved = moved - mx.logsumexp(moved, axis=-1, keepdims=True)
    n = 4000
    noise = keys(mx.array(7, mx.uint32), mx.arange(n)[None])
    one, other = (draw(mx.broadcast_to(rows[None], (1, n, V)), noise) for rows in (law, moved))
    differ = float(np.array(one != other).mean())
    bound = chance_of_difference(law, moved)
    assert 0 < differ < 1.1 * bound < 3 * differ
    assert (
        chance_of_difference(law, law) == 0.0
        and chance_of_difference(mx.tile(law, (99, 1)), mx.tile(moved, (99, 1))) == 1
    )


@cache
def demo() -> tuple[Pair, TokenizerWrapper]:
    model, tokenizer = mtp_mlx.load("demo", dtype=mx.float32)
    return model.pair, tokenizer


def tiny() -> tuple[Pair, TokenizerWrapper]:
    """A pair whose drafter is never right at temperature 0, as its weights are random."""
    return Pair(*tiny_pair("gemma4_keqv")), mtp_mlx.load(FIXTURES / "gemma4_keqv", drafter=None)[1]


def verified(
    plan: Plan, *names: str, target: Target | None = None, pair: tuple[Pair, TokenizerWrapper] | None = None
) -> Report:
    models, tokenizer = pair or demo()
    # A pair of its own: what has been traced must not outlive what a test puts in its place.
    fresh = Pair(target or models.target, models.drafter)
    prompts = {name: encode(tokenizer, PROMPTS[name]) for name in names or ("code",)}
    return verify(fresh, tokenizer, prompts, plan, lambda doing: None)


def test_a_sound_program_passes() -> None:
    report = verified(Plan(tokens=8, sampler=Sample(1.0), drawn=80), "code")
    assert report.verdict == "equal", report.sentence()
    assert report.weakness() is None
    assert [c.depth for c in report.greedy] == [1, 3, "auto"] and len(report.comparisons) == 4
    assert sum(c.accepted for c in report.greedy) > 8
    assert report.fits[0].tokens >= 50 and report.fits[0].strays == 0 and report.fits[0].tokens_per_round > 1.1
    assert [noise.rows for noise in report.numerics.blocks] == [4, 2] and report.numerics.nearness == HARMLESS


def test_a_seed_makes_the_report_repeatable() -> None:
    plan = Plan((2, "auto"), 12, Sample(0.8, top_p=0.9), drawn=24, seed=5)
    first, second = (verified(plan, pair=tiny()).figures() for _ in range(2))
    assert first == second != verified(replace(plan, seed=6), pair=tiny()).figures()


Accept = Callable[[Draft, mx.array, mx.array, Sampler], Kept]


def keep_every_draft(draft: Draft, logprobs: mx.array, keys: mx.array, sampler: Sampler) -> Kept:
    k, right = draft.tokens.shape[1], accept(draft, logprobs, keys, sampler)
    return Kept(mx.array([k]), mx.concatenate([draft.tokens, right.tokens[:, k:]], axis=1))


def keep_probable_drafts(draft: Draft, logprobs: mx.array, keys: mx.array, sampler: Sampler) -> Kept:
    """Keeps what has a tenth of the probability or more, drawn or not: "typical acceptance", which is not lossless."""
    k, right = draft.tokens.shape[1], accept(draft, logprobs, keys, sampler)
    probable = mx.take_along_axis(logprobs[:, :k], draft.tokens[..., None], axis=-1)[..., 0] > math.log(0.1)
    tokens = mx.concatenate([mx.where(probable, draft.tokens, right.tokens[:, :k]), right.tokens[:, k:]], axis=1)
    count = mx.cumprod((tokens[:, :k] == draft.tokens).astype(mx.int32), axis=1).sum(axis=1).astype(mx.int32)
    return Kept(count if k else right.count, tokens)


def draw_colder(draft: Draft, logprobs: mx.array, keys: mx.array, sampler: Sampler) -> Kept:
    """Verification at another temperature than plain decoding's."""
    colder = isinstance(sampler, Sample) and draft.tokens.shape[1] > 0
    return accept(draft, logprobs, keys, Sample(0.9 * sampler.temperature) if colder else sampler)  # type: ignore[attr-defined]


def one_key_for_all_rows(draft: Draft, logprobs: mx.array, keys: mx.array, sampler: Sampler) -> Kept:
    """Every token has the right distribution, but those of one round are not independent of each other."""
    return accept(draft, logprobs, mx.broadcast_to(keys[:, :1], keys.shape), sampler)


@pytest.mark.parametrize("broken", [keep_every_draft, keep_probable_drafts])
def test_an_acceptance_that_changes_greedy_text_is_caught(broken: Accept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "accept", broken)
    report = verified(Plan((3,), 24), "prose")
    assert report.verdict == "fault" and report.greedy[0].strays > 0
    assert report.greedy[0].first is not None and report.greedy[0].gap > 100 * report.numerics.nearness


@pytest.mark.parametrize("broken", [keep_every_draft, keep_probable_drafts, draw_colder, one_key_for_all_rows])
def test_an_acceptance_that_changes_drawn_text_is_caught(broken: Accept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "accept", broken)
    report = verified(Plan((3,), 12, Sample(1.0), drawn=36), "code")
    assert report.fits[0].astray and len(report.fits) == 1, "nothing more has to be drawn"
    assert report.verdict == "fault"


def test_the_distribution_alone_gives_a_sampler_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sampler that does not draw from the law it states: every token is its choice, with and without drafts."""

    def noting(*arguments: Any, **options: Any) -> Iterator[Response]:
        if options["depth"] and options["sampler"] != Greedy():
            seeds.append(options["seed"])
        return stream_generate(*arguments, **options)

    seeds: list[int] = []
    monkeypatch.setattr(verify_module, "stream_generate", noting)
    report = verified(Plan((3,), 16, Dishonest(0.5), drawn=56), pair=tiny())
    assert [fit.strays for fit in report.fits] == [0, 0] and report.fits[1].tokens >= 4 * 56
    assert seeds == list(range(len(seeds))), "a text that raised the suspicion has no say in the second judgement"
    assert report.fits[1].p_value < UNLIKELY and "do not have the target's distribution" in report.sentence()


class Dishonest(Sample):
    """Draws colder than it says."""

    def law(self, logprobs: mx.array, keys: mx.array) -> mx.array:
        return Sample(1.0).law(logprobs, keys)


def test_a_cache_that_keeps_a_rejected_token_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_too_many(self: Cache, count: mx.array | int) -> None:
        commit(self, count if isinstance(count, int) else count + 1)

    commit = Cache.commit
    monkeypatch.setattr(Cache, "commit", one_too_many)
    report = verified(Plan((3,), 24), "prose")
    assert report.numerics.faults() == [], "without rejected rows there is nothing to see"
    assert report.verdict == "fault" and report.greedy[0].strays == 0
    assert report.greedy[0].shift > 100 * report.numerics.bound


class OtherKernels:
    """A target whose blocks are rounded otherwise than single rows, by about so many nats."""

    def __init__(self, target: Target, noise: float, *, prompts: bool = True):
        self.target, self.noise, self.prompts = target, noise, prompts
        self.context, self.vocabulary, self.nbytes = target.context, target.vocabulary, target.nbytes
        self.make_cache, self.embed, self.kv_bytes = target.make_cache, target.embed, target.kv_bytes

    def __call__(self, tokens: mx.array, cache: Cache, span: Span) -> Output:
        output = self.target(tokens, cache, span)
        if span.length == 1 or (isinstance(span.start, int) and not self.prompts):
            return output
        return output._replace(logits=output.logits + self.noise * mx.sin(1e4 * output.logits))


def test_near_ties_on_other_kernels_are_told_from_faults() -> None:
    target = demo()[0].target
    plan = Plan((1, 3), 32, Sample(1.0), drawn=30)
    report = verified(plan, "prose", target=OtherKernels(target, 0.03))
    assert report.verdict == "near-tie", report.sentence()
    assert 0.03 < report.numerics.nearness < 0.2
    assert any(c.first for c in report.greedy), "nothing flipped, so nothing was tested"
    # The same size of change where nothing rounds: only blocks that are verified differ from all else.
    alone = verified(replace(plan, tokens=8, sampler=None), "prose", target=OtherKernels(target, 0.03, prompts=False))
    assert alone.verdict == "fault" and "rows at a time" in alone.faults()[0]


def test_a_target_that_reads_blocks_wrongly_is_a_fault_and_no_noise() -> None:
    report = verified(Plan((3,), 12), "code", target=OtherKernels(demo()[0].target, 3.0))
    assert report.verdict == "fault" and "read as prompts" in report.faults()[0]


def keep_every_tested_draft(draft: Draft, logprobs: mx.array, keys: mx.array, sampler: Sampler) -> Kept:
    """Rejection sampling that never rejects."""
    return (accept if draft.logprobs is None else keep_every_draft)(draft, logprobs, keys, sampler)


def test_rejection_that_never_rejects_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """No key tells which token is right there, and what a good drafter proposes has the ranks of what is right."""
    monkeypatch.setattr(choosing, "accept", keep_every_tested_draft)
    report = verified(Plan((3,), 16, Sample(1.0), drawn=56), "prose")
    assert [fit.strays for fit in report.fits] == [0, 0]
    assert report.fits[1].p_value < UNLIKELY and report.verdict == "fault"


@pytest.mark.parametrize("variant", ["gemma4_ple", "qwen3_5_tied"])
@pytest.mark.parametrize("length", [1, 20])
def test_a_drafter_is_asked_at_every_token(variant: str, length: int) -> None:
    pair = Pair(*tiny_pair(variant))
    prompt, text = varied_tokens(length), varied_tokens(30, seed=1)
    run = Run("", prompt, 3, Sample(1.0), 0, text, mx.zeros((30, 320)), Stats(length))
    rows = proposals(Pair(pair.target, DialledDrafter.dial(prompt + text, 1.0)), run)
    assert rows.shape == (30, 320) and mx.argmax(rows[1:], axis=-1).tolist() == text[1:]


@pytest.mark.parametrize("name", ["demo", "demo-qwen"])
def test_what_a_drafter_is_asked_is_what_it_proposes(name: str) -> None:
    """Read so, a good drafter is as good as while it drafts: hidden, position and cache are those of a round."""
    loaded, tokenizer = mtp_mlx.load(name, dtype=mx.float32)
    pair = loaded.pair
    prompt = encode(tokenizer, PROMPTS["prose"])
    last = list(stream_generate(pair, tokenizer, prompt, max_tokens=24, depth=1))
    tokens = [response.token for response in last]
    rows = proposals(pair, Run("", prompt, 1, Greedy(), 0, tokens, mx.zeros((24, 1)), last[-1].stats))
    right = np.array(mx.argmax(rows, axis=-1)) == tokens
    # A head that has read the prompt also proposes the first token, which nobody is asked for here.
    found: dict[str, set[bool]] = {"accepted": set(), "correction": set(), "bonus": set(), "plain": set()}
    for response, hit in list(zip(last, right, strict=True))[1:]:
        found[response.origin].add(bool(hit))
    assert found["accepted"] == {True} and found["correction"] == {False}


@pytest.mark.parametrize("variant", ["gemma4_ple", "qwen3_5_tied"])
@pytest.mark.parametrize("length", [1, 20])
def test_reading_a_text_again_gives_the_rows_of_plain_decoding(variant: str, length: int) -> None:
    pair = Pair(*tiny_pair(variant))
    prompt, text = varied_tokens(length), varied_tokens(40, seed=1)
    run = Run("", prompt, 0, Greedy(), 0, text, mx.zeros((40, 320)), Stats(length))
    single = reread(pair, run, 1)
    assert single.shape == (40, 320)
    for rows in (2, 3, 7, None):
        assert gap(single, reread(pair, run, rows)) < 1e-3


def test_texts_that_part_are_judged_to_their_end() -> None:
    pair = Pair(*tiny_pair("gemma4_ple"))
    prompt, text = varied_tokens(5), varied_tokens(20, seed=1)
    plain = Run("a", prompt, 0, Greedy(), 0, text, mx.zeros((20, 320)), Stats(5))
    plain = replace(plain, rows=reread(pair, plain, None))
    run = replace(plain, depth=2, tokens=[*text[:9], *varied_tokens(11, seed=2)])
    run = replace(run, rows=reread(pair, run, None))
    found = compare(pair, plain, run)
    assert found.first is not None and found.first.place == 9 and found.shift < 1e-6
    rows = np.array(run.rows)
    assert found.gap == pytest.approx((rows.max(axis=1) - rows[np.arange(20), run.tokens]).max(), abs=1e-3)
    # Where the texts part it is plain decoding's own row that counts.
    unlikely = plain.rows - 50 * (mx.arange(320) == run.tokens[9])
    assert compare(pair, replace(plain, rows=unlikely), run).gap > 50
    shorter = compare(pair, plain, replace(plain, tokens=text[:7], rows=plain.rows[:7]))
    longer = compare(pair, replace(plain, tokens=text[:7], rows=plain.rows[:7]), plain)
    for cut, ends in ((shorter, (text[7], None)), (longer, (None, text[7]))):
        assert cut.first is not None and (cut.first.plain, cut.first.other) == ends and cut.first.gap is None
        assert cut.verdict(ROUGH) == "fault"


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan((0, 2)), "depth 0 is plain"),
        (Plan(()), "another --depth"),
        (Plan(tokens=1), "1 tokens"),
        (Plan((99,)), "99"),
    ],
)
def test_a_plan_that_proves_nothing_is_refused(plan: Plan, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        verified(plan, pair=tiny())


def test_without_a_drafter_there_is_nothing_to_verify() -> None:
    pair, tokenizer = tiny()
    with pytest.raises(RequestError, match="no drafter"):
        verified(Plan(), pair=(Pair(pair.target, NoDrafter()), tokenizer))


def test_prompts_come_from_lines_or_from_json(tmp_path: Path) -> None:
    lines, listed, wrong = tmp_path / "prompts.txt", tmp_path / "prompts.json", tmp_path / "wrong.json"
    lines.write_text("one\n\n[two]\n")
    listed.write_text('["one\\ntwo", "three"]')
    assert list(read_prompts(lines).values()) == ["one", "[two]"]
    assert read_prompts(listed) == {"prompt 1": "one\ntwo", "prompt 2": "three"}
    for content in ("[]", '{"a": 1}', "[1]", '[""]', "[", "\udcff"):
        wrong.write_bytes(content.encode(errors="surrogateescape"))
        with pytest.raises(RequestError, match=r"wrong\.json"):
            read_prompts(wrong)
    with pytest.raises(RequestError, match="nowhere"):
        read_prompts(tmp_path / "nowhere")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return program("verify", *arguments)


def test_the_command_reports_and_ends_with_the_verdict() -> None:
    model = str(FIXTURES / "gemma4_keqv")
    done = run("--model", model, "--tokens", "4", "--depth", "2", "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("Output is unchanged: 10 of 10 texts")
    for word in (f"{model} with ", "float32", "3 rows at a time", "as a prompt", "per round", "Drawn at temperature 1"):
        assert word in done.stdout
    assert all(name in done.stdout for name in PROMPTS) and done.stderr == "" and "\x1b" not in done.stdout


def test_a_fault_is_reported_with_exit_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "accept", keep_every_draft)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(PROMPTS["prose"])
    options = ["--prompts", str(prompts), "--tokens", "16", "--depth", "3", "--temp", "0", "--dtype", "float32"]
    done = run(*options)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("FAULT: ") and "in place of" in done.stdout
    assert "Traceback" not in done.stderr


def test_json_is_one_object(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("def f(x):\n")
    model = str(FIXTURES / "gemma4_keqv")
    done = run("--model", model, "--json", "--tokens", "4", "--prompts", str(prompts), "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer.keys() == {
        "verdict", "sentence", "weakness", "faults", "numerics", "comparisons", "fits", "model", "drafter", "adapter",
        "versions",
    }  # fmt: skip
    assert answer["verdict"] == "equal" and answer["model"] == model and answer["faults"] == []
    assert [(c["prompt"], c["depth"]) for c in answer["comparisons"]] == [
        ("prompt 1", 1), ("prompt 1", 3), ("prompt 1", "auto"), ("prompt 1", "auto"),
    ]  # fmt: skip
    assert answer["numerics"]["dtype"] == "float32" and answer["fits"][0]["tokens"] >= 80


BAD = {
    "no drafter": (["--drafter", "none"], "nothing to verify without a drafter (drafter turned off)"),
    "depth 0": (["--depth", "0"], "depth 0 is plain decoding"),
    "depth is a word": (["--depth", "fast"], "--depth fast"),
    "few tokens": (["--tokens", "1"], "1 tokens leave nothing"),
    "temperature": (["--temp", "-1"], "temperature"),
    "filter of nothing": (["--temp", "0", "--min-p", "0.1"], "--min-p 0.1 is for texts with --temp above 0"),
    "seed": (["--seed", "-1"], "seed -1"),
    "prompts": (["--prompts", "/nowhere"], "--prompts /nowhere cannot be read"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line_and_exit_1(case: str) -> None:
    arguments, message = BAD[case]
    done = run(*arguments)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("mtp-mlx: ") and done.stderr.count("\n") == 1 and message in done.stderr


def test_wrong_usage_is_exit_2() -> None:
    assert run("--no-such-option").returncode == 2
