"""The assistant against torch and transformers, teacher-forced, below and above the window."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from conftest import VARIANTS, golden, tiny
from test_gemma4 import close, teacher_forced

from mtp_mlx.models.gemma4_assistant import Assistant, Scores, State, Step

HEADS = [(variant, "assistant") for variant in VARIANTS] + [("gemma4_keqv", "assistant_ordered")]
TAGS = {"p": 0, "pm1": -1}  # golden tag -> position offset


def draft_rounds(assistant: Assistant, variant: str, blocks: list[int]) -> list[tuple[list[Step], mx.array]]:
    """Four draft steps from the true state before each golden bonus token; and the drafts themselves."""
    expected = golden(variant)
    tokens = expected["tokens"].tolist()
    rounds = []
    for bonus in expected["draft_bonus"].tolist():
        output, cache = teacher_forced(assistant.target, tokens[:bonus], min(bonus, 14), blocks)
        state = State(cache, output.hidden[:, -1:])
        last = mx.array([tokens[bonus]])
        rounds.append((assistant.steps(state, last, 4), assistant.draft(state, last, 4).tokens))
    return rounds


@pytest.mark.parametrize(("variant", "head"), HEADS)
@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("blocks", [[1], [5, 2]])
def test_drafts_equal_transformers(variant: str, head: str, tag: str, blocks: list[int]) -> None:
    _, assistant = tiny(variant, head)
    assistant = replace(assistant, position_offset=TAGS[tag])
    expected = {name: golden(variant)[f"{head}_{tag}_{name}"] for name in ("tokens", "logits", "hidden")}
    for i, (steps, drafted) in enumerate(draft_rounds(assistant, variant, blocks)):
        assert drafted[0].tolist() == expected["tokens"][i].tolist()
        for j, step in enumerate(steps):
            close(step.hidden[0, 0], expected["hidden"][i, j])
            columns, logits = _by_token(step.scores)
            close(logits, expected["logits"][i, j][columns])
            if step.scores.ids is not None:
                selected = golden(variant)[f"{head}_{tag}_selected"][i, j]
                assert sorted(columns) == np.flatnonzero(selected).tolist()


def test_the_position_policy_changes_the_drafts_logits() -> None:
    """Otherwise the two golden tags could not tell P from P-1."""
    expected = golden("gemma4_keqv")
    assert np.abs(expected["assistant_p_logits"] - expected["assistant_pm1_logits"]).max() > 0.01
    _, assistant = tiny("gemma4_keqv")
    assert assistant.position_offset == 0


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kept", range(5))
def test_drafts_after_a_partly_accepted_round_equal_transformers(variant: str, kept: int) -> None:
    """The next round starts from the hidden of the last kept row, and rejected rows are out of sight."""
    _, assistant = tiny(variant)
    expected = golden(variant)
    place = 5  # of a golden round, above the window
    bonus, tokens = int(expected["draft_bonus"][place]), expected["tokens"].tolist()
    first = bonus - kept - 1  # the block holds the true tokens first..bonus-1, then wrong ones up to five rows
    _, cache = teacher_forced(assistant.target, tokens[:first], first, [1])
    block = mx.array([tokens[first:bonus] + [7] * (4 - kept)])
    span = cache.span(5)
    output = assistant.target(block, cache, span)
    cache.commit(mx.array([kept + 1]))
    state = assistant.advance(assistant.start(cache), block, span, output, mx.array([kept]))
    drafted = assistant.draft(state, mx.array([tokens[bonus]]), 4).tokens
    assert drafted[0].tolist() == expected["assistant_p_tokens"][place].tolist()


@pytest.mark.parametrize("variant", VARIANTS)
def test_drafting_reads_the_cache_in_place(variant: str) -> None:
    """The very arrays of the target's cache are attended to: no copy, no slice."""
    target, assistant = tiny(variant)
    _, cache = teacher_forced(target, golden(variant)["tokens"].tolist(), 30, [4])
    memory = assistant._memory(cache)
    held = [array for layer in cache.layers for array in layer.arrays()]
    for visible, _ in memory.values():
        assert any(visible.keys is array for array in held)
        assert any(visible.values is array for array in held)


@pytest.mark.parametrize(("variant", "head"), HEADS)
def test_a_chain_of_drafts_is_built_without_reading_anything_back(variant: str, head: str) -> None:
    """mx.compile traces with placeholders: a read-back between draft steps would raise here."""
    target, assistant = tiny(variant, head)
    output, cache = teacher_forced(target, golden(variant)["tokens"].tolist(), 30, [4])
    traced = mx.compile(lambda last, hidden: assistant.draft(State(cache, hidden), last, 5).tokens)
    last, hidden = mx.array([7]), output.hidden[:, -1:]
    eager = assistant.draft(State(cache, hidden), last, 5).tokens
    assert traced(last, hidden).tolist() == eager.tolist()


def _by_token(scores: Scores) -> tuple[list[int], np.ndarray]:
    """The tokens that have a score, and the scores."""
    logits = np.array(scores.logits[0, 0])
    ids = list(range(len(logits))) if scores.ids is None else np.array(scores.ids[0, 0]).tolist()
    return ids, logits
