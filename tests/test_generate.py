"""mlx-lm's functions over a pair: same shapes, same text, clear refusals."""

from collections.abc import Iterator

import mlx.core as mx
import mlx_lm
import pytest
from conftest import FIXTURES, AlteredTarget, DialledDrafter, plain, tiny, tiny_qwen, varied_tokens
from mlx_lm.generate import GenerationResponse
from mlx_lm.tokenizer_utils import TokenizerWrapper

import mtp_mlx
from mtp_mlx.errors import RequestError
from mtp_mlx.generate import generate, stream_generate
from mtp_mlx.generation import Response, encode
from mtp_mlx.models.qwen3_5_mtp import Head
from mtp_mlx.ngram import NoDrafter
from mtp_mlx.sampling import Sample
from mtp_mlx.types import Pair

VARIANT = "gemma4_keqv"


@pytest.fixture(scope="module")
def tokenizer() -> TokenizerWrapper:
    _, tokenizer = mtp_mlx.load(FIXTURES / VARIANT, drafter=None)
    return tokenizer


@pytest.fixture
def pair() -> Pair:
    return Pair(*tiny(VARIANT))


def dialled(prompt: list[int], truth: list[int], rate: float = 1.0) -> Pair:
    return Pair(tiny(VARIANT)[0], DialledDrafter.dial(prompt + truth, rate))


def test_one_response_per_token_in_mlx_lms_shape(pair: Pair, tokenizer: TokenizerWrapper) -> None:
    prompt = varied_tokens(20)
    truth = plain(pair.target, prompt, 30)
    responses = list(stream_generate(dialled(prompt, truth, 0.7), tokenizer, prompt, max_tokens=30, depth=3))
    assert all(isinstance(response, GenerationResponse) for response in responses)
    assert [response.token for response in responses] == truth
    assert [response.generation_tokens for response in responses] == list(range(1, 31))
    assert {response.finish_reason for response in responses[:-1]} == {None}
    last = responses[-1]
    assert last.finish_reason == "length" and last.prompt_tokens == 20
    assert last.prompt_tps > 0 and last.generation_tps > 0 and last.peak_memory > 0
    assert last.logprobs.shape == (320,) and mx.argmax(last.logprobs).item() == last.token
    assert last.stats.generation_tokens == 30
    assert sum(response.from_draft for response in responses) == last.stats.accepted
    assert last.stats.memory.target == pair.target.nbytes and last.stats.memory.cache > 0


def test_every_token_says_where_it_came_from(pair: Pair, tokenizer: TokenizerWrapper) -> None:
    prompt = varied_tokens(20)
    truth = plain(pair.target, prompt, 24)

    def origins(rate: float, depth: int) -> list[str]:
        run = stream_generate(dialled(prompt, truth, rate), tokenizer, prompt, max_tokens=24, depth=depth)
        return [response.origin for response in run]

    assert origins(1.0, 0) == ["plain"] * 24
    assert origins(1.0, 3) == (["accepted"] * 3 + ["bonus"]) * 6
    assert origins(0.0, 3) == ["correction"] * 23 + ["plain"], "no draft fits before the last token"


def test_text_equals_mlx_lms(tokenizer: TokenizerWrapper, pair: Pair) -> None:
    theirs, their_tokenizer, *_ = mlx_lm.load(str(FIXTURES / VARIANT))
    theirs.set_dtype(mx.float32)
    for prompt in (
        "def f(x):\n    return",
        "Grüße, 世界 — some text that is longer than one window of tokens",
    ):
        expected = list(mlx_lm.stream_generate(theirs, their_tokenizer, prompt, max_tokens=50))
        for depth in (0, 4, "auto"):
            ours = list(stream_generate(pair, tokenizer, prompt, max_tokens=50, depth=depth))
            assert "".join(r.text for r in ours) == "".join(r.text for r in expected)
            # mlx-lm reports the token that ended the text in its last response, like every other one.
            assert [r.token for r in ours] == [int(r.token) for r in expected]
            assert ours[-1].finish_reason == expected[-1].finish_reason
        assert generate(pair, tokenizer, prompt, max_tokens=50) == "".join(r.text for r in expected)


def test_a_stop_inside_an_accepted_run_ends_the_text_there(tokenizer: TokenizerWrapper, pair: Pair) -> None:
    prompt = varied_tokens(20)
    truth = plain(pair.target, prompt, 30)
    place = next(i for i in range(9, 30) if truth[i] not in truth[:i])
    stopping = _with_stop(tokenizer, truth[place])
    for depth in range(8):
        run = stream_generate(dialled(prompt, truth), stopping, prompt, max_tokens=30, depth=depth)
        responses = list(run)
        assert [response.token for response in responses] == truth[: place + 1]
        assert responses[-1].finish_reason == "stop"
        assert responses[-1].stats.generation_tokens == place + 1
        assert responses[-1].stats.accepted <= place + 1


def _with_stop(tokenizer: TokenizerWrapper, token: int) -> TokenizerWrapper:
    _, copy = mtp_mlx.load(FIXTURES / VARIANT, drafter=None)
    copy.eos_token_ids = {token}
    return copy


def test_a_seeded_sample_does_not_depend_on_the_depth(tokenizer: TokenizerWrapper, pair: Pair) -> None:
    texts = {
        generate(pair, tokenizer, "import os", max_tokens=40, depth=depth, sampler=Sample(0.9), seed=3)
        for depth in (0, 2, 5)
    }
    assert len(texts) == 1


def test_the_prompts_progress_is_reported(tokenizer: TokenizerWrapper, pair: Pair) -> None:
    seen: list[tuple[int, int]] = []
    run = stream_generate(
        pair,
        tokenizer,
        varied_tokens(25),
        max_tokens=1,
        prefill_step_size=10,
        prompt_progress_callback=lambda done, total: seen.append((done, total)),
    )
    list(run)
    assert seen == [(0, 25), (10, 25), (20, 25), (24, 25), (25, 25)]


def _first(run: Iterator[Response]) -> Response:
    return next(run)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "prompt is empty"),
        ([], {}, "prompt is empty"),
        ([5] * 1024, {}, "1024 tokens and the model's context is 1024"),
        ("x", {"max_tokens": 0}, "max tokens is 0"),
        ("x", {"max_tokens": -2}, "max tokens is -2"),
        ("x", {"depth": -1}, "negative"),
        ("x", {"depth": 99}, "limit of 31"),
        ("x", {"prefill_step_size": 0}, "at least 1"),
        ([5, 320], {}, "token 320"),
        ([-1, 5], {}, "token -1"),
        ("x", {"prediction": [320]}, "token 320"),
        ("x", {"seed": -1}, "seed -1 must be"),
        ("x", {"seed": 2**32}, "must be a whole number between"),
        ("x", {"drafts": "best"}, "neither"),
    ],
)
def test_what_cannot_be_served_is_refused(
    prompt: str | list[int], options: dict[str, object], message: str, tokenizer: TokenizerWrapper, pair: Pair
) -> None:
    with pytest.raises(RequestError, match=message):
        _first(stream_generate(pair, tokenizer, prompt, **options))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        _first(stream_generate(pair, tokenizer, prompt, **options))  # type: ignore[arg-type]


def test_generation_ends_at_the_models_context(tokenizer: TokenizerWrapper, pair: Pair) -> None:
    short = Pair(AlteredTarget(pair.target, context=50), pair.drafter)
    responses = list(stream_generate(short, tokenizer, varied_tokens(30), max_tokens=-1, depth=3))
    assert len(responses) == 20 and responses[-1].finish_reason == "length"


def test_without_a_drafter_auto_is_plain_decoding(tokenizer: TokenizerWrapper, pair: Pair) -> None:
    alone = Pair(pair.target, NoDrafter())
    last = list(stream_generate(alone, tokenizer, "x", max_tokens=5))[-1]
    assert last.stats.drafted == 0 and last.stats.depth_reason == "no drafter"


def test_special_tokens_are_added_once(tokenizer: TokenizerWrapper) -> None:
    bos = tokenizer.bos_token_id
    assert encode(tokenizer, "abc")[0] == bos
    assert encode(tokenizer, f"{tokenizer.bos_token}abc").count(bos) == 1
    assert encode(tokenizer, mx.array([4, 5])) == [4, 5]


def test_a_drafter_that_never_hits_is_reported_and_changes_nothing(
    tokenizer: TokenizerWrapper, pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    """At a fixed depth, where no clock says how many drafts are made; tests/test_depth.py has "auto"."""
    prompt = varied_tokens(20)
    truth = plain(pair.target, prompt, 60)
    pair = dialled(prompt, truth, 0.0)
    run = list(stream_generate(pair, tokenizer, prompt, max_tokens=60, depth=3))
    assert [response.token for response in run] == truth
    last = run[-1].stats
    assert last.alarm is not None and last.alarm == last.depth_reason and last.depth == 0
    assert [record.getMessage() for record in caplog.records] == [last.alarm]
    assert all(response.origin == "plain" for response in run[-20:])


def test_a_drafter_that_fits_is_not_reported(tokenizer: TokenizerWrapper, pair: Pair) -> None:
    prompt = varied_tokens(20)
    truth = plain(pair.target, prompt, 60)
    run = list(stream_generate(dialled(prompt, truth, 0.4), tokenizer, prompt, max_tokens=60, depth=3))
    assert run[-1].stats.alarm is None


def test_at_depth_0_no_drafter_is_kept_up_to_date(tokenizer: TokenizerWrapper, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain decoding is what everything is measured against: it must not pay for a head that is not used."""
    pair = Pair(*tiny_qwen("qwen3_5_tied"))
    monkeypatch.setattr(Head, "advance", None)
    last = list(stream_generate(pair, tokenizer, varied_tokens(20), max_tokens=5, depth=0))[-1].stats
    assert last.generation_tokens == 5 and last.memory.drafter == pair.drafter.nbytes
    with pytest.raises(TypeError):
        list(stream_generate(pair, tokenizer, varied_tokens(20), max_tokens=5, depth=1))
