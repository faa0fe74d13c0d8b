"""The target against torch and transformers (golden values) and against mlx-lm (same weights)."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import FIXTURES, VARIANTS, WINDOW, gap, golden, mlx_lm_model, rows_of, tiny, varied_tokens
from mlx.utils import tree_flatten

from mtp_mlx.cache import Cache
from mtp_mlx.models.gemma4 import FULL, SLIDING, Model, TextConfig
from mtp_mlx.types import Output, Span

# float32 against torch on tiny random networks, which amplify rounding: reference values agree to 2e-4.
TOLERANCE = 2e-4


def close(mine: mx.array | np.ndarray, theirs: np.ndarray) -> None:
    """Equal up to float32 rounding through a random network."""
    np.testing.assert_allclose(np.array(mine), theirs, rtol=TOLERANCE, atol=TOLERANCE)


def teacher_forced(model: Model, tokens: list[int], prompt: int, blocks: list[int]) -> tuple[Output, Cache]:
    """All outputs along a text: `prompt` tokens read at once, the rest in blocks, as in decoding."""
    cache = model.make_cache()
    cache.reserve(len(tokens) + 8)
    ids = mx.array(tokens)[None]
    outputs = []
    if prompt:
        outputs.append(model(ids[:, :prompt], cache, Span(0, prompt)))
        cache.commit(prompt)
    done = prompt
    while done < len(tokens):
        length = min(blocks[len(outputs) % len(blocks)], len(tokens) - done)
        outputs.append(model(ids[:, done : done + length], cache, cache.span(length)))
        cache.commit(length)
        done += length
    joined = Output(*(mx.concatenate([output[i] for output in outputs], axis=1) for i in range(2)))
    return joined, cache


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("prompt", "blocks"),
    [(56, [1]), (0, [1]), (5, [4]), (WINDOW - 1, [1]), (WINDOW, [5]), (WINDOW + 1, [1, 3, 8]), (40, [2])],
)
def test_logits_and_hidden_equal_transformers(variant: str, prompt: int, blocks: list[int]) -> None:
    target, _ = tiny(variant)
    expected = golden(variant)
    output, _ = teacher_forced(target, expected["tokens"].tolist(), prompt, blocks)
    close(output.logits[0], expected["logits"])
    close(output.hidden[0], expected["hidden"])
    assert (np.array(output.logits[0]).argmax(-1) == expected["logits"].argmax(-1)).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_cache_holds_what_the_assistant_is_given(variant: str) -> None:
    """Keys and values of the last sliding and the last full layer with a cache, in the order of time."""
    target, _ = tiny(variant)
    expected = golden(variant)
    tokens = expected["tokens"].tolist()
    _, cache = teacher_forced(target, tokens, 20, [3])
    for kind, name in ((FULL, "full"), (SLIDING, "sliding")):
        layer = cache.attention(target.config.owner(kind))
        shown = np.array(layer.mask(Span(cache.position - 1, 1)))[0, 0, 0]
        places = np.flatnonzero(shown)
        if kind == SLIDING:
            size = len(shown)
            wanted = np.arange(len(tokens) - WINDOW, len(tokens))
            assert sorted(places) == sorted(wanted % size)
            places = wanted % size
        visible = rows_of(layer.stored())
        for mine, theirs in zip(visible, (expected[f"{name}_keys"], expected[f"{name}_values"]), strict=True):
            close(np.array(mine[0])[:, places], theirs[:, -len(places) :])


@pytest.mark.parametrize("variant", VARIANTS)
def test_mlx_lm_weights_are_handed_over_without_a_copy(variant: str) -> None:
    theirs = mlx_lm_model(FIXTURES / variant)
    config = json.loads((FIXTURES / variant / "config.json").read_text())
    ours = Model(TextConfig.from_dict(config))
    weights = ours.sanitize(dict(tree_flatten(theirs.parameters())))
    mine = dict(tree_flatten(ours.parameters()))
    assert weights.keys() == mine.keys()
    assert {name: array.shape for name, array in weights.items()} == {n: a.shape for n, a in mine.items()}
    mx.eval(list(weights.values()))
    before = mx.get_active_memory()
    ours.load_weights(list(weights.items()))
    del mine
    mx.eval(ours.parameters())
    assert mx.get_active_memory() <= before
    for model in (ours, theirs):
        model.set_dtype(mx.float32)
    tokens = mx.array(varied_tokens(40))[None]
    output = ours(tokens, ours.make_cache(), Span(0, 40))
    assert gap(output.logits, theirs(tokens)) < 1e-4


def test_both_config_styles_mean_the_same_model() -> None:
    folder = FIXTURES / "gemma4_keqv"
    styles = [json.loads((folder / name).read_text()) for name in ("config.json", "config_new_style.json")]
    released, saved = (TextConfig.from_dict(style) for style in styles)
    assert released == saved
    assert len(set(released.head_dims)) == 2


@pytest.mark.parametrize(
    ("size", "head_dims", "kv_heads", "owners"),
    [
        ("E2B", (256, 512), (1, 1), (13, 14)),
        ("E4B", (256, 512), (2, 2), (22, 23)),
        ("12B", (256, 512), (8, 1), (46, 47)),
        ("26B-A4B", (256, 512), (8, 2), (28, 29)),
        ("31B", (256, 512), (16, 4), (58, 59)),
    ],
)
def test_every_released_size_is_read_from_its_config(
    size: str, head_dims: tuple[int, int], kv_heads: tuple[int, int], owners: tuple[int, int]
) -> None:
    sizes = json.loads((Path(__file__).parent / "fixtures" / "gemma4_sizes.json").read_text())
    config = TextConfig.from_dict(sizes[size])
    sliding, full = config.owner(SLIDING), config.owner(FULL)
    assert (sliding, full) == owners
    assert (config.head_dims[sliding], config.head_dims[full]) == head_dims
    assert (config.kv_heads[sliding], config.kv_heads[full]) == kv_heads
