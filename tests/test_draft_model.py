"""A smaller model as drafter: its cache follows the target's through every partial acceptance."""

import mlx.core as mx
import pytest
from conftest import (
    VOCAB,
    WINDOW,
    DialledDrafter,
    Forced,
    Recorder,
    gap,
    needs_compiler,
    one_pass,
    open_sequence,
    run_rounds,
    tiny_pair,
    varied_tokens,
)
from test_rounds import EXACT

from mtp_mlx.accept import normalise
from mtp_mlx.batch import UNTOLD, Round
from mtp_mlx.cache import MAX_BLOCK
from mtp_mlx.draft_model import DraftModel
from mtp_mlx.sequence import Sequence
from mtp_mlx.types import Target

FAMILIES = ["gemma4_ple", "gemma4_keqv", "qwen3_5_tied", "qwen3_5_moe"]
LENGTH = 60


def _says(sequence: Sequence, k: int) -> mx.array:
    """What the draft model says after the newest token, (V,), in a draft of k tokens that nobody looks at."""
    sequence.commit()
    heard = Recorder()
    sequence.pair.drafter.draft(sequence.state, sequence.cache, mx.array(sequence.text[-1:]), k, heard)
    return normalise(heard.logits[0][0])[0]


@pytest.mark.parametrize("variant", FAMILIES)
@pytest.mark.parametrize(("k", "length"), [(1, WINDOW + 1), (5, 1), (5, 3 * WINDOW)])
def test_a_model_that_drafts_for_itself_says_what_it_says_as_target(variant: str, k: int, length: int) -> None:
    """Below and above the window, after copies of which 0 to all were right, and after drafts that came to nothing."""
    target, _ = tiny_pair(variant)
    text = varied_tokens(length + LENGTH + 40, seed=length)
    forced, rows = Forced(mx.array(text)), one_pass(target, text)
    sequence = open_sequence(target, DraftModel(target), forced)
    sequence.prefill(text[:length], WINDOW, lambda done, total: None)
    sequence.round(0)
    for right, wrong in ((0, 2), (k, 0), (1, 3), (5, 1), (0, 0), (12, 4), (2, 2)):
        here = sequence.length + 1
        copy = text[here : here + right] + [(token + 1) % VOCAB for token in text[here + right :][:wrong]]
        assert sequence.round(copy).accepted == right
        for _ in range(2):
            assert gap(_says(sequence, k), rows[sequence.length]) < EXACT
            sequence.round(k)
        assert sequence.text == text[: sequence.length + 1]


@pytest.mark.parametrize("variant", FAMILIES)
def test_in_a_batch_it_says_of_every_text_what_it_says_of_one_alone(variant: str) -> None:
    """Texts that join with and without an unread block, and keep different numbers of copied tokens."""
    target, _ = tiny_pair(variant)
    text = varied_tokens(4 * WINDOW + 60, seed=5)
    forced, rows = Forced(mx.array(text + [0] * 40)), one_pass(target, text)

    def copy(sequence: Sequence, right: int, size: int) -> list[int]:
        following = text[sequence.length + 1 :][:size]
        return [(token + (place >= right)) % VOCAB for place, token in enumerate(following)]

    texts = [open_sequence(target, DraftModel(target), forced) for _ in range(3)]
    for sequence, length in zip(texts, (5, WINDOW + 1, 3 * WINDOW), strict=True):
        sequence.prefill(text[:length], WINDOW, lambda done, total: None)
    texts[0].round(0)
    assert texts[1].round(copy(texts[1], 1, 4)).accepted == 1
    texts[1].round(2)
    batch = texts[0].batch
    for sequence in texts[1:]:
        batch.join(sequence.batch)
    for rights in ((3, 0, 1), (0, 5, 5), (2, 2, 0)):
        results = batch.round([copy(*case, 5) for case in zip(texts, rights, strict=True)])
        assert [result.accepted for result in results if isinstance(result, Round)] == list(rights)
        batch.round(0)
        batch.round(2)
    batch.release([texts[2]])
    batch.round(3)
    texts[2].round(3)
    batch.release(texts)
    for sequence in texts:
        assert sequence.text == text[: sequence.length + 1]
        assert gap(_says(sequence, 3), rows[sequence.length]) < EXACT


@pytest.mark.parametrize("variant", ["gemma4_keqv", "qwen3_5_tied"])
def test_it_is_told_later_of_rounds_without_drafts_and_of_long_blocks(variant: str) -> None:
    target, _ = tiny_pair(variant)
    text = varied_tokens(UNTOLD + 200)
    forced, rows = Forced(mx.array(text)), one_pass(target, text)
    sequence = open_sequence(target, DraftModel(target), forced)
    sequence.prefill(text[: WINDOW + 3], 7, lambda done, total: None)
    for alone in (1, 5, UNTOLD + 3):
        for _ in range(alone):
            sequence.round(0)
        sequence.round(3)
        assert gap(_says(sequence, 3), rows[sequence.length]) < EXACT
        here = sequence.length + 1
        assert sequence.round(text[here : here + MAX_BLOCK - 1]).accepted == MAX_BLOCK - 1
        assert gap(_says(sequence, 3), rows[sequence.length]) < EXACT


@pytest.mark.parametrize("variant", ["gemma4_keqv", "qwen3_5_tied"])
def test_an_unread_block_that_ends_where_the_buffers_end_has_room(variant: str) -> None:
    target, _ = tiny_pair(variant)
    text = varied_tokens(300)
    forced, rows = Forced(mx.array(text)), one_pass(target, text)
    sequence = open_sequence(target, DraftModel(target), forced)
    sequence.prefill(text[:240], 2048, lambda done, total: None)
    wrong = [(token + 1) % VOCAB for token in text[240:256]]
    assert sequence.round(wrong).accepted == 0 and sequence.cache.capacity == 256
    for _ in range(3):
        assert gap(_says(sequence, 2), rows[sequence.length]) < EXACT
        sequence.round(2)


@pytest.mark.parametrize(("target", "drafter"), [("gemma4_keqv", "gemma4_ple"), ("qwen3_5_moe", "qwen3_5_tied")])
@pytest.mark.parametrize(("length", "bits"), [(WINDOW + 1, None), (3 * WINDOW, 8)])
def test_another_model_of_the_family_changes_nothing(target: str, drafter: str, length: int, bits: int | None) -> None:
    """Also one whose layers are of other kinds and numbers, and beside a quantised cache."""
    model, other = tiny_pair(target)[0], DraftModel(tiny_pair(drafter)[0])
    nobody = DialledDrafter.dial([], 0.0)
    text = varied_tokens(length + 40, seed=length) + [0] * 20
    forced = Forced(mx.array(text))
    _, expected, _ = run_rounds(model, nobody, forced, text[:length], 20, 0, kv_bits=bits)
    tokens, rows, _ = run_rounds(model, other, forced, text[:length], 20, 4, WINDOW, kv_bits=bits)
    assert tokens == text[length : length + 20] and gap(rows, expected) < EXACT


@needs_compiler
@pytest.mark.parametrize("variant", ["gemma4_ple", "qwen3_5_tied"])
@pytest.mark.usefixtures("compiled")
def test_compiled_rounds_are_the_same(variant: str) -> None:
    target: Target = tiny_pair(variant)[0]
    text = varied_tokens(100)
    forced, rows = Forced(mx.array(text)), one_pass(target, text)
    sequence = open_sequence(target, DraftModel(target), forced)
    sequence.prefill(text[:WINDOW], 2048, lambda done, total: None)
    sequence.round(0)
    for copy in ([], [1, 2], text[WINDOW + 9 : WINDOW + 12]):
        sequence.round(copy)
        for _ in range(3):
            sequence.round(3)
            assert sequence.text == text[: sequence.length + 1]
        assert gap(_says(sequence, 3), rows[sequence.length]) < EXACT
