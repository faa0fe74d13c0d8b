"""Our networks over mlx-lm's caches give what mlx-lm's own give: chunks, single steps, padded batches."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from conftest import QWEN, VARIANTS, WINDOW, gap, tiny_pair, varied_tokens
from faces import chunked, ours, theirs
from mlx_lm.models.cache import (
    ArraysCache,
    BatchRotatingKVCache,
    ChunkedKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    load_prompt_cache,
    save_prompt_cache,
)

from mtp_mlx.errors import RequestError
from mtp_mlx.model import Model
from mtp_mlx.types import Pair

LENGTH = 2 * WINDOW + 8
TOLERANCE = 2e-4  # Gemma is exact, the recurrence is summed in another order
HYBRID = [variant for variant in QWEN if not variant.endswith("sharded")]


def batch(model: Any, texts: list[list[int]], step: int) -> tuple[list[mx.array], list[Any]]:
    """Texts of several lengths, read as mlx-lm's BatchGenerator does: the logits of each, and the caches."""
    caches = [row[0].merge(list(row)) for row in zip(*(model.make_cache() for _ in texts), strict=True)]
    lengths, longest = [len(text) for text in texts], max(len(text) for text in texts)
    for held in caches:
        held.prepare(lengths=lengths, right_padding=[longest - length for length in lengths])
    tokens = mx.array([text + [0] * (longest - len(text)) for text in texts])
    logits = chunked(model, tokens, [*range(step, longest, step), longest], caches)
    for held in caches:
        held.finalize()
    return [logits[b, :length] for b, length in enumerate(lengths)], caches


@pytest.mark.parametrize("variant", VARIANTS + HYBRID)
def test_caches_are_those_of_mlx_lms_own_model(variant: str) -> None:
    mine, wanted = ours(variant).make_cache(), theirs(variant).make_cache()
    assert [type(held) for held in mine] == [type(held) for held in wanted]
    for one, other in zip(mine, wanted, strict=True):
        if isinstance(one, RotatingKVCache):
            assert (one.max_size, one.keep) == (other.max_size, other.keep)
        if isinstance(one, ArraysCache):
            assert len(one.cache) == len(other.cache)


@pytest.mark.parametrize("variant", VARIANTS + HYBRID)
def test_chunks_and_steps_give_mlx_lms_logits_on_both_sides_of_the_window(variant: str) -> None:
    tokens = mx.array(varied_tokens(2 * LENGTH)).reshape(2, LENGTH)
    whole = theirs(variant)(tokens)
    ends = [5, 6, 7, WINDOW + 4, WINDOW + 5, WINDOW + 12, WINDOW + 13, LENGTH - 3, LENGTH - 2, LENGTH - 1, LENGTH]
    assert gap(chunked(ours(variant), tokens, ends, ours(variant).make_cache()), whole) < TOLERANCE
    assert gap(ours(variant)(tokens), whole) < TOLERANCE
    assert gap(ours(variant)(tokens[:, :1]), theirs(variant)(tokens[:, :1])) < TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS + HYBRID)
def test_padded_batches_give_each_text_its_own_logits(variant: str) -> None:
    """One text longer than the window and one shorter, then single steps and a block of several tokens."""
    texts = [varied_tokens(2 * WINDOW + 3, 1), varied_tokens(5, 2)]
    more = mx.array(varied_tokens(20, 3)).reshape(2, 10)
    logits, caches = batch(ours(variant), texts, 7)
    later = chunked(ours(variant), more, [1, 2, 3, 10], caches)
    for b, text in enumerate(texts):
        alone = theirs(variant)(mx.array([text + more[b].tolist()]))[0]  # type: ignore[operator]
        assert gap(logits[b], alone[: len(text)]) < TOLERANCE
        assert gap(later[b], alone[len(text) :]) < TOLERANCE


@pytest.mark.parametrize("variant", ["qwen3_5_dense", "gemma4_keqv"])
def test_left_padding_changes_nothing(variant: str) -> None:
    text, padding = varied_tokens(WINDOW + 6), 4
    caches = ours(variant).make_cache()
    merged = [held.merge([held, type(held).from_state(held.state)]) for held in caches]
    for held in merged:
        if isinstance(held, ArraysCache):
            held.left_padding = mx.array([padding, 0])
        else:
            held.prepare(left_padding=[padding, 0])
    tokens = mx.array([[0] * padding + text, varied_tokens(padding, 9) + text])
    alone = theirs(variant)(mx.array([text]))[0]
    assert gap(chunked(ours(variant), tokens, [9, len(text) + padding], merged)[0, padding:], alone) < TOLERANCE


@pytest.mark.parametrize("variant", ["gemma4_ple", "qwen3_5_moe", "qwen3_next"])
def test_a_prompt_cache_goes_on_in_the_other_model(variant: str, tmp_path: Path) -> None:
    tokens = mx.array(varied_tokens(LENGTH))[None]
    wanted = theirs(variant)(tokens)[:, WINDOW + 5 :]
    for first, second in ((ours(variant), theirs(variant)), (theirs(variant), ours(variant))):
        caches = first.make_cache()
        chunked(first, tokens[:, : WINDOW + 5], [WINDOW, WINDOW + 5], caches)
        save_prompt_cache(str(tmp_path / "held.safetensors"), caches)
        loaded = load_prompt_cache(str(tmp_path / "held.safetensors"))
        assert gap(second(tokens[:, WINDOW + 5 :], cache=loaded), wanted) < TOLERANCE


def test_a_quantised_prompt_cache_gives_mlx_lms_logits() -> None:
    variant, tokens = "qwen3_5_dense", mx.array(varied_tokens(LENGTH))[None]
    logits = []
    for model in (ours(variant), theirs(variant)):
        caches = model.make_cache()
        model(tokens[:, :20], cache=caches)
        caches = [held.to_quantized(32, 8) if isinstance(held, KVCache) else held for held in caches]
        logits.append(chunked(model, tokens[:, 20:], [1, 9, LENGTH - 20], caches))
    lost = gap(logits[1], theirs(variant)(tokens)[:, 20:])
    assert gap(*logits) < min(2e-3, lost / 5)  # a number on the border of two steps may fall either way


def test_a_pair_with_quantised_keys_makes_quantised_caches() -> None:
    target, drafter = tiny_pair("qwen3_5_dense")
    model = Model(Pair(target, drafter, kv_bits=8), {})
    kinds = {type(held) for held in model.make_cache()}
    assert kinds == {ArraysCache, QuantizedKVCache}
    tokens = mx.array(varied_tokens(20))[None]
    exact = ours("qwen3_5_dense")(tokens)
    assert 1e-3 < gap(model(tokens), exact) < 1.0


@pytest.mark.parametrize(
    ("variant", "change", "words"),
    [
        ("gemma4_keqv", lambda caches: caches[:-1], "layers, this model keeps"),
        ("gemma4_keqv", lambda caches: [KVCache() for _ in caches], "layer 0 of the prompt cache is a KVCache"),
        ("gemma4_keqv", lambda caches: [RotatingKVCache(99) for _ in caches], "keeps 99 tokens, this model's window"),
        ("qwen3_5_dense", lambda caches: [KVCache() for _ in caches], "needs ArraysCache"),
        ("qwen3_5_dense", lambda caches: [ArraysCache(2) for _ in caches], "needs KVCache or BatchKVCache"),
        ("qwen3_5_dense", lambda caches: [*caches[:-1], ChunkedKVCache(8)], "is a ChunkedKVCache"),
    ],
)
def test_caches_of_another_model_are_refused(variant: str, change: Any, words: str) -> None:
    caches = change(ours(variant).make_cache())
    with pytest.raises(RequestError, match=r"make_prompt_cache\(model\)") as error:
        ours(variant)(mx.array([[5, 6]]), cache=caches)
    assert words in str(error.value)


def test_what_mlx_lm_miscounts_still_stands_there() -> None:
    """Once mlx-lm masks a block after single steps right by itself, `StockRows.mask` need not reorder its ring."""
    held = BatchRotatingKVCache(4, [0, 3])
    rows = mx.zeros((2, 1, 4, 2))
    held.update_and_fetch(rows, rows)
    held.update_and_fetch(rows[:, :, :1], rows[:, :, :1])
    before = held.make_mask(2)
    held._temporal_order()
    assert before.tolist() != held.make_mask(2).tolist()
