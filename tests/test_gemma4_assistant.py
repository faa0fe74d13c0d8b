"""The assistant against torch and transformers, teacher-forced, below and above the window."""

from dataclasses import replace
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest
from conftest import VARIANTS, Recorder, golden, rows_of, tiny
from test_gemma4 import close, teacher_forced

from mtp_mlx.models.gemma4_assistant import Assistant, Model, Scores, Step

HEADS = [(variant, "assistant") for variant in VARIANTS] + [("gemma4_keqv", "assistant_ordered")]
TAGS = {"p": 0, "pm1": -1}  # golden tag -> position offset


class Watched:
    """A network whose steps are remembered."""

    def __init__(self, network: Model):
        self.network, self.config = network, network.config
        self.steps: list[Step] = []

    def __call__(self, *inputs: Any) -> Step:
        self.steps.append(self.network(*inputs))
        return self.steps[-1]


def draft_rounds(assistant: Assistant, variant: str, blocks: list[int]) -> list[tuple[list[Step], Recorder]]:
    """Four draft steps from the true state before each golden bonus token; and what was picked."""
    expected = golden(variant)
    tokens = expected["tokens"].tolist()
    rounds = []
    for bonus in expected["draft_bonus"].tolist():
        output, cache = teacher_forced(assistant.target, tokens[:bonus], min(bonus, 14), blocks)
        pick, watched = Recorder(), Watched(assistant.network)
        drafter = replace(assistant, network=cast(Model, watched))
        drafter.draft((output.hidden[:, -1:],), cache, mx.array([tokens[bonus]]), 4, pick)
        rounds.append((watched.steps, pick))
    return rounds


@pytest.mark.parametrize(("variant", "head"), HEADS)
@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("blocks", [[1], [5, 2]])
def test_drafts_equal_transformers(variant: str, head: str, tag: str, blocks: list[int]) -> None:
    _, assistant = tiny(variant, head)
    assistant = replace(assistant, position_offset=TAGS[tag])
    expected = {name: golden(variant)[f"{head}_{tag}_{name}"] for name in ("tokens", "logits", "hidden")}
    for i, (steps, pick) in enumerate(draft_rounds(assistant, variant, blocks)):
        assert pick.draft == expected["tokens"][i].tolist()
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
    state = assistant.advance(assistant.start(cache), cache, block, span, output.hidden, mx.array([kept]))
    pick = Recorder()
    assistant.draft(state, cache, mx.array([tokens[bonus]]), 4, pick)
    assert pick.draft == expected["assistant_p_tokens"][place].tolist()


@pytest.mark.parametrize("variant", VARIANTS)
def test_drafting_reads_the_cache_in_place(variant: str) -> None:
    """The very arrays of the target's cache are attended to: no copy, no slice."""
    target, assistant = tiny(variant)
    _, cache = teacher_forced(target, golden(variant)["tokens"].tolist(), 30, [4])
    memory = assistant._memory(cache)
    held = [array for layer in cache.layers for array in layer.arrays()]
    for visible, _ in memory.values():
        assert any(rows_of(visible).keys is array for array in held)
        assert any(rows_of(visible).values is array for array in held)


def _by_token(scores: Scores) -> tuple[list[int], np.ndarray]:
    """The tokens that have a score, and the scores."""
    logits = np.array(scores.logits[0, 0])
    ids = list(range(len(logits))) if scores.ids is None else np.array(scores.ids[0, 0]).tolist()
    return ids, logits
