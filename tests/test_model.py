"""A pair stands where mlx-lm has a model: its functions, called with ours, give what they give with its own."""

import copy
from collections.abc import Iterator
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from conftest import FIXTURES, VOCAB, gap, varied_tokens
from faces import ours, theirs
from mlx_lm.generate import batch_generate, generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.perplexity import eval_ppl
from mlx_lm.utils import compute_bits_per_weight, get_total_parameters, load_tokenizer

from mtp_mlx.errors import RequestError

BOTH = ["gemma4_ple", "qwen3_5_dense"]
TOLERANCE = 2e-4


def written(model: nn.Module, prompt: list[int], text: list[int], **options: Any) -> mx.array:
    """The log-probabilities along a text that mlx-lm's `generate_step` is made to write, (T, V)."""
    rest = iter([*text, 0])  # it runs one step ahead
    steps: Iterator[tuple[int, mx.array]] = generate_step(  # type: ignore[assignment]
        mx.array(prompt), model, max_tokens=len(text), sampler=lambda _: mx.array([next(rest)]), **options
    )
    return mx.stack([logprobs for _, logprobs in steps])


@pytest.mark.parametrize("variant", BOTH)
def test_generate_step_gives_mlx_lms_logprobs(variant: str) -> None:
    prompt, text = varied_tokens(20), varied_tokens(16, 1)
    rows = [written(model, prompt, text, prefill_step_size=7) for model in (ours(variant), theirs(variant))]
    assert rows[0].shape == (16, VOCAB)
    assert gap(*rows) < TOLERANCE


def test_generate_step_quantises_its_cache_as_with_mlx_lms_model() -> None:
    prompt, text = varied_tokens(20), varied_tokens(10, 1)
    options = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 5}
    mine, wanted = (written(model, prompt, text, **options) for model in (ours(BOTH[1]), theirs(BOTH[1])))
    exact = written(theirs(BOTH[1]), prompt, text)
    assert gap(mine, wanted) < gap(wanted, exact) / 5


@pytest.mark.parametrize("variant", BOTH)
def test_stream_generate_writes_mlx_lms_text(variant: str) -> None:
    tokenizer = load_tokenizer(FIXTURES / variant)
    texts = []
    for model in (ours(variant), theirs(variant)):
        responses = mlx_lm.stream_generate(model, tokenizer, "Once upon a time", max_tokens=12)
        texts.append([(response.token, response.text, response.finish_reason) for response in responses])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("variant", BOTH)
def test_batch_generate_writes_mlx_lms_texts(variant: str) -> None:
    """Prompts on both sides of the window, in chunks and padded; then further prompts onto what that has left."""
    tokenizer = load_tokenizer(FIXTURES / variant)
    prompts = [varied_tokens(length, seed) for seed, length in enumerate((3, 25, 40))]
    results = []
    for model in (ours(variant), theirs(variant)):
        first = batch_generate(
            model,
            tokenizer,
            prompts,
            max_tokens=[14, 2, 6],
            prefill_step_size=8,
            return_token_ids=True,
            return_logprobs=True,
            return_prompt_caches=True,
        )
        caches = copy.deepcopy(first.caches)
        more = batch_generate(
            model,
            tokenizer,
            [varied_tokens(length, 9) for length in (7, 2, 5)],
            prompt_caches=caches,
            max_tokens=4,
            return_token_ids=True,
            return_logprobs=True,
        )
        results.append((first, more))
    for mine, wanted in zip(*results, strict=True):
        assert mine.token_ids == wanted.token_ids and mine.texts == wanted.texts
        for one, other in zip(mine.logprobs or [], wanted.logprobs or [], strict=True):
            assert gap(mx.array(one), mx.array(other)) < TOLERANCE


@pytest.mark.parametrize("variant", BOTH)
def test_perplexity_is_mlx_lms(variant: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = mx.array(varied_tokens(160)).reshape(4, 40)
    mine, wanted = (eval_ppl(model, data, batch_size=3) for model in (ours(variant), theirs(variant)))
    assert mine == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("variant", BOTH)
def test_scores_of_continuations_are_mlx_lms(variant: str) -> None:
    """As in mlx_lm.evaluate: a prefix is read once, and each continuation scored on a copy of its cache."""
    prefix, continuations = varied_tokens(21), [varied_tokens(length, length) for length in (2, 9, 30)]
    scores = []
    for model in (ours(variant), theirs(variant)):
        cache = make_prompt_cache(model)
        for start in (0, 16):
            model(mx.array([prefix[start : start + 16]]), cache=cache)
        scores.append([score(model, text, copy.deepcopy(cache)) for text in continuations])
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)


def score(model: Any, text: list[int], cache: list[Any]) -> float:
    logprobs = nn.log_softmax(model(mx.array([text[:-1]]), cache=cache))
    scores = mx.take_along_axis(logprobs[0], mx.array(text[1:])[:, None], axis=-1)
    return cast(float, scores.sum().item())


def test_embeddings_are_refused() -> None:
    with pytest.raises(RequestError, match="takes token ids only"):
        ours(BOTH[0])(mx.array([[5]]), input_embeddings=mx.zeros((1, 1, 8)))
    steps = generate_step(mx.array([5, 6]), ours(BOTH[0]), input_embeddings=mx.zeros((2, 8)))
    with pytest.raises(RequestError, match="takes token ids only"):
        next(iter(steps))


@pytest.mark.parametrize("variant", BOTH)
def test_what_mlx_lm_counts_and_looks_up_is_there(variant: str) -> None:
    mine, wanted = ours(variant), theirs(variant)
    assert get_total_parameters(mine) == get_total_parameters(wanted)
    assert compute_bits_per_weight(mine) == pytest.approx(compute_bits_per_weight(wanted), rel=1e-3)
    assert len(mine.layers) == len(wanted.layers)
    assert mine.model_type == mine.args.model_type == variant
    assert mine.pair.target is mine.target
