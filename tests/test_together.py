"""Many texts in one batch: each is what it would be alone, whoever comes and goes beside it."""

import gc
from functools import cache
from typing import Any
from unittest import mock

import mlx.core as mx
import pytest
from conftest import (
    VARIANTS,
    VOCAB,
    WINDOW,
    DialledDrafter,
    Forced,
    drafted,
    gap,
    open_sequence,
    plain,
    run_rounds,
    tiny_pair,
    varied_tokens,
)

from mtp_mlx.batch import Batch, Round
from mtp_mlx.choosing import Callables, Rules
from mtp_mlx.penalties import Penalties
from mtp_mlx.sampling import Greedy, Sample
from mtp_mlx.sequence import Sequence
from mtp_mlx.types import Pair

KINDS = [*VARIANTS, "qwen3_5_tied", "qwen3_5_moe"]
LENGTHS = [1, 3 * WINDOW, 5, WINDOW, WINDOW + 1, 2, WINDOW - 1, 2 * WINDOW]  # around the sliding window, mixed
EXACT = 2e-4  # float32, as in test_rounds.py
TEXT = 4 * WINDOW + 60


@cache
def _along(variant: str) -> tuple[list[int], Forced, mx.array]:
    """A varied text, the sampler that writes it, and plain decoding's log-probabilities from its second token on."""
    text = varied_tokens(TEXT, seed=3) + [0] * 40
    forced, nobody = Forced(mx.array(text)), DialledDrafter.dial([], 0.0)
    return text, forced, run_rounds(tiny_pair(variant)[0], nobody, forced, text[:1], TEXT - 1, 0)[1]


def _begun(sequence: Sequence, prompt: list[int]) -> Sequence:
    """It has read its prompt and written a token, so that others may join it."""
    sequence.prefill(prompt, WINDOW, lambda done, total: None)
    sequence.round(0)
    return sequence


def _joined(sequences: list[Sequence]) -> Batch:
    batch = sequences[0].batch
    for sequence in sequences[1:]:
        batch.join(sequence.batch)
    assert batch.sequences == sequences
    return batch


def _sound(results: list[Round | Exception]) -> list[Round]:
    for result in results:
        assert isinstance(result, Round), result
    return [result for result in results if isinstance(result, Round)]


@pytest.mark.parametrize("variant", KINDS)
def test_every_row_equals_plain_decoding_whoever_comes_and_goes(variant: str) -> None:
    """At every partial acceptance, above and below the window; rows join and leave between rounds, and come back."""
    text, forced, expected = _along(variant)
    drafter = DialledDrafter.every_partial(text, 1, 4, seed=1)
    target, _ = tiny_pair(variant)
    texts = [_begun(open_sequence(target, drafter, forced), text[:length]) for length in LENGTHS]
    batch, seen = _joined(texts[:2]), set[int]()

    def check(number: int, k: int) -> None:
        for _ in range(number):
            before = [sequence.length for sequence in batch.sequences]
            results = _sound(batch.round(k))
            for sequence, result, read in zip(batch.sequences, results, before, strict=True):
                seen.add(result.accepted)
                assert sequence.text == text[: len(sequence.text)]
                rows = expected[read : read + len(result.tokens)]
                assert gap(result.logprobs[: len(result.tokens)], rows) < EXACT

    check(2, 4)
    for sequence in texts[2:5]:
        batch.join(sequence.batch)
    check(3, 4)
    batch.release([texts[0], texts[3]])
    assert texts[0].batch.sequences == [texts[0]] and len(batch.sequences) == 3
    check(2, 0)
    for _ in range(3):
        alone = texts[0].round(4)
        read = texts[0].length - len(alone.tokens)
        assert gap(alone.logprobs[: len(alone.tokens)], expected[read : read + len(alone.tokens)]) < EXACT
    for sequence in (texts[0], *texts[5:]):
        batch.join(sequence.batch)
    check(3, 4)
    assert len(batch.sequences) == 7 and seen == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("variant", KINDS)
@pytest.mark.parametrize("rows", [2, 8])
def test_the_drafter_proposes_what_it_would_for_a_text_alone(variant: str, rows: int) -> None:
    target, drafter = tiny_pair(variant)
    prompts = [varied_tokens(length, seed=length) for length in LENGTHS[:rows]]
    alone = [_begun(open_sequence(target, drafter, Greedy()), prompt) for prompt in prompts]
    texts = [_begun(open_sequence(target, drafter, Greedy()), prompt) for prompt in prompts]
    batch = _joined(texts)
    for k in (3, 1, 0, 0, 0, 5, 0, 2):
        results = _sound(batch.round(k))
        singles = [sequence.round(k) for sequence in alone]
        assert [result.tokens for result in results] == [single.tokens for single in singles]
    batch.commit()
    proposed = [row for sequence in alone for row in _proposed(sequence)]
    assert drafted(batch.sequences[0], 5) == proposed
    together = batch.sequences
    batch.release(together)
    assert [row for sequence in together for row in drafted(sequence, 5)] == proposed


@pytest.mark.parametrize("variant", ["gemma4_keqv", "qwen3_5_tied"])
def test_a_drafter_that_is_told_later_learns_of_what_each_text_has_kept(variant: str) -> None:
    """Plain rounds and copies tell it nothing at first, and copies are kept unevenly."""
    text, forced, _ = _along(variant)
    target, drafter = tiny_pair(variant)

    def copy(sequence: Sequence, right: int) -> list[int]:
        following = text[sequence.length + 1 :][:4]
        return [(token + (place >= right)) % VOCAB for place, token in enumerate(following)]

    def opened() -> list[Sequence]:
        return [_begun(open_sequence(target, drafter, forced), text[:length]) for length in (5, WINDOW, 2 * WINDOW)]

    texts, alone = opened(), opened()
    batch = _joined(texts)
    plans: list[tuple[int, ...] | int] = [0, 0, (3, 0, 1), 0, (2, 2, 2), 0, (0, 4, 0), 2, (1, 0, 3), 0]
    for plan in plans:
        rights = (plan,) * 3 if isinstance(plan, int) else plan
        copied = not isinstance(plan, int)
        cases = list(zip(alone, batch.sequences, rights, strict=True))
        batch.round([copy(sequence, right) for _, sequence, right in cases] if copied else rights[0])
        for single, _, right in cases:
            single.round(copy(single, right) if copied else right)
        assert [sequence.text for sequence in batch.sequences] == [sequence.text for sequence in alone]
    batch.commit()
    assert drafted(batch.sequences[0], 5) == [row for sequence in alone for row in _proposed(sequence)]


def _proposed(sequence: Sequence) -> list[list[int]]:
    sequence.commit()
    return drafted(sequence, 5)


@pytest.mark.parametrize("variant", ["gemma4_moe", "qwen3_5_tied"])
def test_each_text_has_its_own_sampler_seed_penalties_and_callables(variant: str) -> None:
    target, drafter = tiny_pair(variant)
    warm, hot = Sample(0.7, top_p=0.9), Sample(1.5, top_k=20)

    def banned(tokens: mx.array, logits: mx.array) -> mx.array:
        return mx.where(mx.arange(logits.shape[-1]) == tokens[-1], -1e4, logits)

    choosers: list[Rules | Callables] = [
        Rules(),
        Rules(warm, drafts="coupled"),
        Rules(warm, Penalties(repetition=1.5, frequency=0.3), "argmax"),
        Rules(hot, drafts=Sample(0.9)),
        Callables(warm, (banned,)),
        Rules(hot, drafts=Sample(0.9)),
        Rules(warm, drafts="coupled"),
        Callables(lambda logprobs: mx.argmin(logprobs, axis=-1)),
    ]
    prompts = [varied_tokens(length, seed=length) for length in LENGTHS]
    pair = Pair(target, drafter)

    def opened() -> list[Sequence]:
        cases = zip(prompts, choosers, strict=True)
        return [_begun(Sequence(pair, chooser, seed), prompt) for seed, (prompt, chooser) in enumerate(cases, 40)]

    texts, alone = opened(), opened()
    batch = _joined(texts)
    accepted = set[int]()
    for k in (3, 0, 5, 2, 4):
        results = _sound(batch.round(k))
        for sequence, result in zip(alone, results, strict=True):
            single = sequence.round(k)
            assert result.tokens == single.tokens
            assert gap(result.logprobs[: len(result.tokens)], single.logprobs[: len(single.tokens)]) < EXACT
            accepted.add(result.accepted)
    assert len(accepted) > 1


@pytest.mark.parametrize("variant", ["gemma4_ple", "qwen3_5_tied"])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_caches_are_batched_too(variant: str, bits: int) -> None:
    target, drafter = tiny_pair(variant)
    prompts = [varied_tokens(length, seed=length) for length in LENGTHS[:4]]

    def opened() -> list[Sequence]:
        return [_begun(open_sequence(target, drafter, Greedy(), kv_bits=bits), prompt) for prompt in prompts]

    texts, alone = opened(), opened()
    batch = _joined(texts)
    for _ in range(6):
        assert [result.tokens for result in _sound(batch.round(3))] == [each.round(3).tokens for each in alone]


@pytest.mark.parametrize("variant", ["gemma4_keqv", "qwen3_5_dense"])
def test_rows_of_different_capacity_meet(variant: str) -> None:
    """One text has outgrown the smallest buffers, the other has not; both grow on in one batch."""
    target, drafter = tiny_pair(variant)
    prompts = varied_tokens(20, seed=2), varied_tokens(300, seed=1), varied_tokens(30, seed=3)
    texts = [_begun(open_sequence(target, drafter, Greedy()), prompt) for prompt in prompts]
    batch = _joined(texts)
    for _ in range(20):
        _sound(batch.round(3))
    for sequence, prompt in zip(batch.sequences, prompts, strict=True):
        written = sequence.text[len(prompt) :]
        assert written == plain(target, prompt, len(written))


@pytest.mark.parametrize("fault", ["masks", "advance"])
def test_a_grammar_that_fails_leaves_the_others_alone(fault: str) -> None:
    target, drafter = tiny_pair("qwen3_5_tied")
    prompts = [varied_tokens(length, seed=length) for length in LENGTHS[:3]]
    texts = [_begun(open_sequence(target, drafter, Greedy()), prompt) for prompt in prompts]
    batch = _joined(texts)
    grammar = mock.Mock(free=False, **{"masks.return_value": None, f"{fault}.side_effect": ZeroDivisionError})
    texts[1].grammar = grammar
    results = batch.round(2)
    assert isinstance(results[1], ZeroDivisionError)
    batch.release([texts[1]])
    for _ in range(3):
        _sound(batch.round(2))
    for sequence, prompt in ((texts[0], prompts[0]), (texts[2], prompts[2])):
        written = sequence.text[len(prompt) :]
        assert written == plain(target, prompt, len(written))


def test_a_text_that_leaves_does_not_double_the_memory_of_those_who_stay() -> None:
    target, drafter = tiny_pair("gemma4_keqv")
    texts = [_begun(open_sequence(target, drafter, Greedy()), varied_tokens(300, seed=row)) for row in range(8)]
    batch = _joined(texts)
    batch.commit()
    gc.collect()
    held, largest = batch.cache.nbytes, max(_nbytes(layer.arrays()) for layer in batch.cache.layers)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    batch.release(texts[:1])
    assert mx.get_peak_memory() - before < held / 8 + 1.2 * largest


def _nbytes(arrays: list[Any]) -> int:
    return sum(array.nbytes for array in arrays)


@pytest.mark.parametrize("variant", ["gemma4_keqv", "qwen3_5_dense"])
def test_a_text_that_fails_leaves_the_others_alone(variant: str) -> None:
    target, drafter = tiny_pair(variant)
    prompts = [varied_tokens(length, seed=length) for length in LENGTHS[:3]]
    calls = 0

    def faulty(tokens: mx.array, logits: mx.array) -> mx.array:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise ZeroDivisionError("a fault of the caller's")
        return logits

    pair = Pair(target, drafter)
    choosers: list[Rules | Callables] = [Rules(), Callables(Greedy(), (faulty,)), Rules()]
    texts = [_begun(Sequence(pair, chooser), prompt) for chooser, prompt in zip(choosers, prompts, strict=True)]
    batch = _joined(texts)
    for _ in range(4):
        results = batch.round(0)
        if isinstance(results[1], Exception):
            break
    assert isinstance(results[1], ZeroDivisionError)
    failed = texts[1].text.copy()
    batch.release([texts[1]])
    assert texts[1].text == failed and texts[1].cache.position.item() == texts[1].length
    for _ in range(4):
        _sound(batch.round(3))
    for sequence, prompt in ((texts[0], prompts[0]), (texts[2], prompts[2])):
        written = sequence.text[len(prompt) :]
        assert written == plain(target, prompt, len(written))
