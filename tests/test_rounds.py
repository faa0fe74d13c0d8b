"""Speculation changes nothing: every kept row is the one plain decoding computes, at every partial acceptance."""

from functools import cache
from itertools import islice, pairwise
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import (
    FIXTURES,
    QWEN,
    VARIANTS,
    WINDOW,
    AlteredTarget,
    DialledDrafter,
    Forced,
    drafted,
    float32_copy,
    gap,
    mlx_lm_model,
    one_pass,
    open_sequence,
    plain,
    run_rounds,
    tiny,
    tiny_pair,
    tiny_qwen,
    varied_tokens,
)
from mlx_lm.generate import generate_step

from mtp_mlx.cache import Cache
from mtp_mlx.depth import Fixed
from mtp_mlx.errors import MTPError
from mtp_mlx.models.gemma4_assistant import Assistant
from mtp_mlx.rounds import rounds
from mtp_mlx.sampling import Greedy, Sample
from mtp_mlx.types import Span, State

# The other tiny Qwens differ from these two in their files only.
ROUNDS = [*VARIANTS, "qwen3_5_tied", "qwen3_5_moe"]
# One process for all tests of a variant, as they share what plain decoding writes.
each_variant = pytest.mark.parametrize(
    "variant", [pytest.param(variant, marks=pytest.mark.xdist_group(variant)) for variant in ROUNDS]
)
PROMPTS = [1, 5, WINDOW, WINDOW + 1, 3 * WINDOW]  # below, across and above the sliding window
STEP = WINDOW  # prompt tokens read at a time; the truth is read at once


def _prompts(variant: str) -> list[int]:
    """Lengths of prompts; for a recurrent layer, one more that begins a second chunk with a single token."""
    return [*PROMPTS, WINDOW + 2] if variant in QWEN else PROMPTS


# Depth, length of the prompt, share of drafts that are right. The test of rows has every depth after every prompt.
GREEDY = [(1, WINDOW, 1.0), (3, 5, 0.7), (5, 1, 0.0), (7, 3 * WINDOW, 0.7), (7, WINDOW + 1, 1.0)]
LENGTH = 36  # tokens generated: from the shortest prompt on, twice the window; 0 to 7 drafts right in 8 rounds
EXACT = 2e-4  # float32, when the order of the keys in the ring differs; equal to the bit otherwise


@cache
def _forced_rows(variant: str, prompt: int) -> tuple[list[int], Forced, mx.array]:
    """A varied text, the sampler that writes it, and plain decoding's log-probabilities along it."""
    text = varied_tokens(prompt + LENGTH, seed=prompt) + [0] * 20
    forced = Forced(mx.array(text))
    nobody = DialledDrafter.dial([], 0.0)
    return text, forced, run_rounds(tiny_pair(variant)[0], nobody, forced, text[:prompt], LENGTH, 0)[1]


@each_variant
@pytest.mark.parametrize(("k", "length", "rate"), GREEDY)
def test_greedy_speculation_equals_plain_decoding(variant: str, k: int, length: int, rate: float) -> None:
    target, _ = tiny_pair(variant)
    prompt = varied_tokens(length, seed=length)
    truth = plain(target, prompt, LENGTH)
    drafter = DialledDrafter.dial(prompt + truth, rate, seed=k)
    text, _, accepted = run_rounds(target, drafter, Greedy(), prompt, LENGTH, k, STEP)
    assert text == truth
    if rate == 1.0:
        assert set(accepted[:-1]) == {k}
    if rate == 0.0:
        assert set(accepted) == {0}


@each_variant
@pytest.mark.parametrize("k", range(1, 8))
def test_every_kept_row_equals_plain_decoding_along_a_varied_text(variant: str, k: int) -> None:
    """Token equality alone could hide a wrong cache: a tiny model may repeat one token whatever it sees."""
    target, _ = tiny_pair(variant)
    for length in _prompts(variant):
        text, forced, expected = _forced_rows(variant, length)
        drafter = DialledDrafter.every_partial(text, length, k, seed=length)
        tokens, rows, accepted = run_rounds(target, drafter, forced, text[:length], LENGTH, k, STEP)
        assert tokens == text[length : length + LENGTH]
        assert gap(rows, expected) < EXACT
        assert set(accepted) == set(range(k + 1)), "not every partial acceptance has occurred"


@pytest.mark.parametrize("variant", ["gemma4_ple", "gemma4_keqv", "qwen3_5_tied"])
@pytest.mark.parametrize("bits", [4, 8])
def test_with_a_quantised_cache_every_kept_row_equals_plain_decoding_with_that_cache(variant: str, bits: int) -> None:
    target, own = tiny_pair(variant)
    nobody = DialledDrafter.dial([], 0.0)
    for length in (1, WINDOW + 1, 3 * WINDOW):
        text, forced, exact = _forced_rows(variant, length)
        _, expected, _ = run_rounds(target, nobody, forced, text[:length], LENGTH, 0, STEP, kv_bits=bits)
        # Rounding does something, and not much: keys and values are near those that it began with.
        assert EXACT < gap(expected, exact) < (0.3 if bits == 8 else 5.0)
        for k in (2, 7):
            drafter = DialledDrafter.every_partial(text, length, k, seed=length)
            tokens, rows, accepted = run_rounds(target, drafter, forced, text[:length], LENGTH, k, 2048, kv_bits=bits)
            assert tokens == text[length : length + LENGTH] and gap(rows, expected) < EXACT
            assert set(accepted) == set(range(k + 1))
        _, rows, _ = run_rounds(target, own, forced, text[:length], WINDOW, 3, STEP, kv_bits=bits)
        assert gap(rows, expected[:WINDOW]) < EXACT


@each_variant
@pytest.mark.parametrize(("k", "length"), [(2, 1), (7, 5), (7, WINDOW), (2, 3 * WINDOW)])
def test_the_drafter_itself_changes_nothing(variant: str, k: int, length: int) -> None:
    """Its weights are random, so it is hardly ever right; whatever it writes into the cache has to go."""
    target, drafter = tiny_pair(variant)
    text, forced, expected = _forced_rows(variant, length)
    rows = run_rounds(target, drafter, forced, text[:length], WINDOW + 4, k, STEP)[1]
    assert gap(rows, expected[: WINDOW + 4]) < EXACT


@cache
def _rows_after_20(variant: str) -> tuple[list[int], Forced, mx.array]:
    """A varied text, and plain decoding's log-probabilities along it after the first 20 tokens."""
    text = varied_tokens(80, seed=7) + [0] * 20
    forced, nobody = Forced(mx.array(text)), DialledDrafter.dial([], 0.0)
    return text, forced, run_rounds(tiny_pair(variant)[0], nobody, forced, text[:20], 40, 0)[1]


@each_variant
@pytest.mark.parametrize("k", [3, 7])
def test_a_conversation_goes_on_after_a_stop_inside_an_accepted_run(variant: str, k: int) -> None:
    """Whichever token of a round is the last: the next turn is as if exactly the tokens up to it had been read."""
    target, _ = tiny_pair(variant)
    text, forced, expected = _rows_after_20(variant)
    for cut in range(1, k + 2):
        drafter = DialledDrafter.dial(text, 1.0)
        sequence = open_sequence(target, drafter, forced)
        sequence.prefill(text[:20], STEP, lambda done, total: None)
        first = sequence.round(k)
        assert first.accepted == k
        second = sequence.round(k)
        sequence.keep(cut)
        emitted = first.tokens + second.tokens[:cut]
        here = 20 + len(emitted)
        assert emitted == text[20:here] and sequence.length == here - 1
        sequence.prefill(text[here : here + 6], 4, lambda done, total: None)
        assert sequence.length == here + 5 == sequence.cache.position.item()
        rows = mx.concatenate([sequence.round(k).logprobs for _ in range(2)])
        assert len(rows) == 2 * (k + 1) and gap(rows, expected[here + 6 - 20 :][: len(rows)]) < EXACT


@each_variant
def test_a_drafter_goes_on_after_a_stop_as_if_it_had_read_the_whole(variant: str) -> None:
    target, drafter = tiny_pair(variant)
    text = varied_tokens(80) + [0] * 20
    forced, silent = Forced(mx.array(text)), lambda done, total: None
    sequence = open_sequence(target, drafter, forced)
    sequence.prefill(text[:20], STEP, silent)
    sequence.round(0)
    sequence.round(5)
    result = sequence.round(0)
    sequence.keep(len(result.tokens))
    here = sequence.length + 1
    sequence.prefill(text[here : here + 6], 4, silent)
    fresh = open_sequence(target, drafter, forced)
    fresh.prefill(text[: here + 6], 2048, silent)
    for each in (sequence, fresh):
        each.round(0)
        each.commit()
    drafts = [drafted(each, 6) for each in (sequence, fresh)]
    assert drafts[0] == drafts[1]


@pytest.mark.parametrize("variant", [*VARIANTS, "qwen3_5_dense"])
def test_the_drafter_reads_buffers_that_have_just_grown(variant: str) -> None:
    """At position 256 every full layer gets a larger buffer, before the drafter looks at it."""
    target, assistant = tiny_pair(variant)
    text = varied_tokens(265)
    forced, expected = Forced(mx.array(text + [0] * 20)), one_pass(target, text)
    # In the first round, after some, and after the prompt has filled the buffers to the last row.
    for k, length, tokens in ((4, 253, 8), (1, 253, 8), (4, 247, 16), (4, 256, 8)):
        rows = run_rounds(target, assistant, forced, text[:length], tokens, k)[1]
        assert gap(rows, expected[length - 1 :][:tokens]) < EXACT


def test_a_prompt_does_not_run_through_layers_that_store_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last half of E2B and E4B shares keys: computing it for every prompt token would double the time."""
    target, assistant = tiny("gemma4_ple")
    told: list[int] = []
    advance = Assistant.advance

    def counted(
        self: Assistant, state: State, cache: Cache, tokens: mx.array, span: Span, hidden: mx.array, count: mx.array
    ) -> State:
        told.append(tokens.shape[1])
        return advance(self, state, cache, tokens, span, hidden, count)

    monkeypatch.setattr(Assistant, "advance", counted)
    sequence = open_sequence(target, assistant, Greedy())
    sequence.prefill(varied_tokens(50), 20, lambda done, total: None)
    assert told == [] and not sequence.ready
    (first,) = rounds(sequence, Fixed(4), 1)
    assert told == [] and first.drafted == 0
    second, third = islice(rounds(sequence, Fixed(4), 50), 2)
    assert told == [1, 5] and second.drafted == third.drafted == 4


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("length", [2, 12, 3 * WINDOW])
def test_plain_decoding_equals_mlx_lm(variant: str, length: int) -> None:
    target, _ = tiny(variant)
    theirs = mlx_lm_model(FIXTURES / variant)
    theirs.set_dtype(mx.float32)
    prompt = varied_tokens(length, seed=length)
    steps = generate_step(mx.array(prompt), theirs, max_tokens=24)
    assert plain(target, prompt, 24) == [int(token) for token, _ in steps]


@pytest.mark.parametrize("variant", QWEN)
@pytest.mark.parametrize("length", [2, 12, 3 * WINDOW])
def test_plain_decoding_of_qwen_equals_mlx_lm(variant: str, length: int, tmp_path: Path) -> None:
    theirs = mlx_lm_model(float32_copy(variant, tmp_path / variant))
    prompt = varied_tokens(length, seed=length)
    steps = generate_step(mx.array(prompt), theirs, max_tokens=24)
    assert plain(tiny_qwen(variant)[0], prompt, 24) == [int(token) for token, _ in steps]


@pytest.mark.parametrize("variant", ROUNDS)
def test_a_seeded_sample_is_the_same_text_at_every_depth(variant: str) -> None:
    """With every kind of sampler and penalty in test_choosing.py."""
    target, own = tiny_pair(variant)
    prompt, sampler = varied_tokens(14), Sample(1.5, top_p=0.95)
    nobody = DialledDrafter.dial([], 0.0)
    truth = run_rounds(target, nobody, sampler, prompt, LENGTH, 0, seed=2)[0]
    for k in (3, 7):
        drafter = DialledDrafter.every_partial(prompt + truth, len(prompt), k, seed=2)
        assert run_rounds(target, drafter, sampler, prompt, LENGTH, k, seed=2)[0] == truth
    for drafts in ("coupled", "argmax"):
        assert run_rounds(target, own, sampler, prompt, 12, 4, seed=2, drafts=drafts)[0] == truth[:12]
    assert len(set(truth)) > 10


@pytest.mark.parametrize("variant", ["gemma4_ple", "gemma4_moe", "qwen3_5_dense"])
def test_prefill_does_not_depend_on_its_chunks(variant: str) -> None:
    target, assistant = tiny_pair(variant)
    text = varied_tokens(110)
    forced = Forced(mx.array(text + [0] * 20))
    _, expected, kept = run_rounds(target, assistant, forced, text[:80], 12, 3, step=7)
    for step in (1, 3, WINDOW, 2048):
        _, rows, kept_here = run_rounds(target, assistant, forced, text[:80], 12, 3, step=step)
        assert gap(rows, expected) < EXACT
        assert kept == kept_here


@pytest.mark.parametrize("variant", ["gemma4_ple", "qwen3_5_tied"])
def test_a_long_generation_grows_its_buffers_without_a_change(variant: str) -> None:
    target, _ = tiny_pair(variant)
    text = varied_tokens(560)  # buffers are of 256, 512 and more
    forced, expected = Forced(mx.array(text + [0] * 20)), one_pass(target, text)
    for prompt in (240, 490):
        _, rows, _ = run_rounds(target, DialledDrafter.dial(text, 0.7), forced, text[:prompt], 40, 5)
        assert gap(rows, expected[prompt - 1 :][:40]) < EXACT


@pytest.mark.parametrize("variant", ["gemma4_keqv", "qwen3_5_dense"])
def test_the_host_reads_once_per_round(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target, assistant = tiny_pair(variant)
    sequence = open_sequence(target, assistant, Greedy())
    sequence.prefill(varied_tokens(20), 2048, lambda done, total: None)
    sequence.round(0)
    waits: list[int] = []
    evaluate = mx.eval

    def counted(*arrays: object) -> None:
        waits.append(1)
        evaluate(*arrays)

    monkeypatch.setattr(mx, "eval", counted)
    monkeypatch.setattr(mx, "async_eval", counted)
    for _ in range(5):
        sequence.round(4)
    assert len(waits) == 5


def test_rounds_never_emit_more_than_asked_for() -> None:
    target, _ = tiny("gemma4_keqv")
    prompt = varied_tokens(10)
    truth = plain(target, prompt, 20)
    for budget in range(1, 9):
        drafter = DialledDrafter.dial(prompt + truth, 1.0)
        sequence = open_sequence(target, drafter, Greedy())
        sequence.prefill(prompt, 2048, lambda done, total: None)
        emitted = [token for result in rounds(sequence, Fixed(5), budget) for token in result.tokens]
        assert emitted == truth[:budget]


def test_a_sequence_knows_its_length_and_commits_what_it_emitted() -> None:
    target, _ = tiny("gemma4_ple")
    prompt = varied_tokens(10)
    truth = plain(target, prompt, 40)
    sequence = open_sequence(target, DialledDrafter.dial(prompt + truth, 0.5), Greedy())
    sequence.prefill(prompt, 4, lambda done, total: None)
    lengths = [sequence.length]
    emitted = 0
    while emitted < 30:
        emitted += len(sequence.round(4).tokens)
        lengths.append(sequence.length)
        assert sequence.length == len(prompt) - 1 + emitted
    assert all(later > earlier for earlier, later in pairwise(lengths))


def test_logits_that_are_not_finite_are_an_error_and_not_a_token() -> None:
    target, assistant = tiny("gemma4_keqv")

    sequence = open_sequence(AlteredTarget(target, factor=float("nan")), assistant, Greedy())
    sequence.prefill(varied_tokens(10), 2048, lambda done, total: None)
    with pytest.raises(MTPError, match="not finite"):
        sequence.round(0)


def test_rows_after_a_wrong_draft_may_be_anything() -> None:
    """They continue a text that nobody wrote, so what is wrong with them is no fault of the model."""
    target, _ = tiny("gemma4_keqv")
    prompt = varied_tokens(10)
    truth = plain(target, prompt, 12)
    wrong = (truth[2] + 1) % 320  # what the dialled drafter says at the third place
    drafter = DialledDrafter.dial(prompt + truth, 0.0)
    assert wrong not in truth
    text, _, _ = run_rounds(AlteredTarget(target, poison=wrong), drafter, Greedy(), prompt, 12, 4)
    assert text == truth


def test_phases_are_timed_only_where_a_round_is_split() -> None:
    target, assistant = tiny("gemma4_keqv")
    sequence = open_sequence(target, assistant, Greedy())
    sequence.prefill(varied_tokens(10), 2048, lambda done, total: None)
    sequence.round(0)
    whole, parts = sequence.round(3).times, sequence.round(3, split=True).times
    assert whole.commit is None and whole.draft is None and whole.verify is None
    assert parts.commit is not None and parts.draft is not None and parts.verify is not None
    assert np.isclose(parts.commit + parts.draft + parts.verify + parts.host, parts.total)


class _InterruptionError(Exception):
    pass


@pytest.mark.parametrize("variant", ["gemma4_keqv", "qwen3_5_tied"])
def test_a_prompt_that_was_broken_off_is_gone_on_with(variant: str) -> None:
    """As a server does that cancels a request and keeps what has been read."""
    text = varied_tokens(60)
    forced = Forced(mx.array(text + [0] * 20))

    def stop(done: int, total: int) -> None:
        if done == 16:
            raise _InterruptionError

    sequence = open_sequence(*tiny_pair(variant), forced)
    with pytest.raises(_InterruptionError):
        sequence.prefill(text[:40], 16, stop)
    sequence.prefill(text[sequence.length + 1 : 40], 16, lambda done, total: None)
    fresh = open_sequence(*tiny_pair(variant), forced)
    fresh.prefill(text[:40], 16, lambda done, total: None)
    assert sequence.length == fresh.length == 39
    for k in (0, 4):
        assert gap(sequence.round(k).logprobs, fresh.round(k).logprobs) < EXACT


@pytest.mark.parametrize("variant", ["gemma4_keqv", "qwen3_5_tied"])
def test_an_interruption_between_two_rounds_costs_nothing(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target, drafter = tiny_pair(variant)
    text = varied_tokens(60)
    forced = Forced(mx.array(text + [0] * 20))
    sequences = [open_sequence(target, drafter, forced) for _ in range(2)]
    for sequence in sequences:
        sequence.prefill(text[:20], 16, lambda done, total: None)
        sequence.round(0)
        sequence.round(4)

    def interrupted(*_: object) -> None:
        raise _InterruptionError

    with monkeypatch.context() as patch:
        patch.setattr(type(drafter), "advance", interrupted)
        with pytest.raises(_InterruptionError):
            sequences[0].round(3)
    rows = [sequence.round(3) for sequence in sequences]
    assert rows[0].tokens == rows[1].tokens and gap(rows[0].logprobs, rows[1].logprobs) == 0
    assert mx.array_equal(sequences[0].cache.position, sequences[1].cache.position)


@pytest.mark.parametrize("variant", ["gemma4_keqv", "qwen3_5_tied"])
def test_a_drafter_that_was_not_asked_for_long_knows_the_text_when_it_is(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain rounds and copies do not tell it of anything; before it drafts again it catches up at once."""
    monkeypatch.setattr("mtp_mlx.batch.UNTOLD", 20)  # test_draft_model.py waits for as long as it is
    target, drafter = tiny_pair(variant)
    text = varied_tokens(100)
    forced = Forced(mx.array(text + [0] * 40))
    sequence, told = open_sequence(target, drafter, forced), open_sequence(target, drafter, forced)
    for each in (sequence, told):
        each.prefill(text[:20], STEP, lambda done, total: None)
    for plain_rounds in (1, 3, 27):
        for _ in range(plain_rounds):
            sequence.round(0)
        here = sequence.length + 1
        sequence.round([*text[here : here + 3], 0])
        while told.length < sequence.length:
            told.round(0)
            told.commit()  # tells it at once
        sequence.commit()
        assert sequence.length == told.length
        drafts = [drafted(each, 5) for each in (sequence, told)]
        assert drafts[0] == drafts[1]
        assert gap(sequence.state[0], told.state[0]) < EXACT
