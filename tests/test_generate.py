"""mlx-lm's functions over a pair: same shapes, same text, clear refusals."""

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from conftest import FIXTURES, AlteredTarget, DialledDrafter, gap, plain, tiny, tiny_pair, tiny_qwen, varied_tokens
from faces import ours, theirs
from mlx_lm.generate import GenerationResponse
from mlx_lm.generate import generate_step as their_steps
from mlx_lm.generate import stream_generate as their_stream
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

import mtp_mlx
from mtp_mlx.draft_model import DraftModel
from mtp_mlx.errors import RequestError
from mtp_mlx.generate import generate, generate_step, stream_generate
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


# --------------------------------------------------------------------------- mlx-lm's names and arguments

BOTH = ["gemma4_ple", "qwen3_5_tied"]


def test_mlx_lms_parameters_have_their_names_places_and_defaults() -> None:
    """All that mlx-lm's functions take, ours take; keywords of ours come behind."""
    mine, steps = (dict(inspect.signature(function).parameters) for function in (stream_generate, their_steps))
    expected = list(inspect.signature(their_stream).parameters.values())
    for name, parameter in zip(mine, expected[:-1], strict=False):
        assert name == parameter.name and mine[name].kind == parameter.kind
        assert name == "stream" or mine[name].default == parameter.default
    keywords = [name for name, parameter in steps.items() if parameter.kind is inspect.Parameter.KEYWORD_ONLY]
    assert len(keywords) == 11
    for name in keywords:
        assert mine[name].default == steps[name].default, name
    assert list(inspect.signature(generate).parameters)[:4] == ["model", "tokenizer", "prompt", "verbose"]
    assert list(inspect.signature(generate_step).parameters)[:3] == ["prompt", "model", "stream"]


@pytest.mark.parametrize("depth", [0, 3])
@pytest.mark.parametrize("variant", BOTH)
def test_steps_are_mlx_lms(variant: str, depth: int) -> None:
    """Token, log-probabilities and the callback's calls; nothing ends a text but its number of tokens."""
    prompt, seen = varied_tokens(20), ([], [])  # type: ignore[var-annotated]
    options: list[dict[str, Any]] = [
        {"prefill_step_size": 8, "prompt_progress_callback": lambda *done, calls=calls: calls.append(done)}
        for calls in seen
    ]
    expected = list(their_steps(mx.array(prompt), theirs(variant), max_tokens=12, **options[0]))
    found = list(generate_step(mx.array(prompt), ours(variant), max_tokens=12, depth=depth, **options[1]))
    assert [token for token, _ in found] == [token for token, _ in expected]
    assert all(type(token) is int and row.shape == (320,) for token, row in found)
    assert max(gap(mine, other) for (_, mine), (_, other) in zip(found, expected, strict=True)) < 1e-4
    assert seen[0] == seen[1] == [(0, 20), (8, 20), (16, 20), (19, 20), (20, 20)]


@pytest.mark.parametrize(("temperature", "chain"), [(0.9, "penalties"), (0.9, "none"), (0.0, "bias")])
@pytest.mark.parametrize("variant", BOTH)
def test_samplers_and_processors_write_mlx_lms_text_of_the_same_seed(
    variant: str, temperature: float, chain: str
) -> None:
    """MLX's random state is theirs alone."""
    chains: dict[str, Callable[[], list[Any]]] = {
        "penalties": lambda: make_logits_processors(repetition_penalty=1.4, presence_penalty=0.3),
        "bias": lambda: make_logits_processors(logit_bias={7: 5.0}),
        "none": list,
    }
    prompt = varied_tokens(9)

    def options() -> dict[str, Any]:
        mx.random.seed(11)
        sampler = make_sampler(temperature, top_p=0.9, min_p=0.01)
        return {"max_tokens": 14, "sampler": sampler, "logits_processors": chains[chain]()}

    expected = [int(token) for token, _ in their_steps(mx.array(prompt), theirs(variant), **options())]
    for depth in (0, 3):
        assert [token for token, _ in generate_step(prompt, ours(variant), depth=depth, **options())] == expected


def test_a_text_without_chance_leaves_mlxs_random_state_alone(tokenizer: TokenizerWrapper, pair: Pair) -> None:
    mx.random.seed(5)
    expected = mx.random.uniform().item()
    mx.random.seed(5)
    generate(pair, tokenizer, "x", max_tokens=3)
    assert mx.random.uniform().item() == expected


def test_verbose_prints_what_mlx_lm_prints(tokenizer: TokenizerWrapper, capsys: pytest.CaptureFixture[str]) -> None:
    other, their_tokenizer, *_ = mlx_lm.load(str(FIXTURES / VARIANT))
    other.set_dtype(mx.float32)

    def printed() -> str:
        return re.sub(r"\d+\.\d+", "N", capsys.readouterr().out)

    mlx_lm.generate(other, their_tokenizer, "def f(", verbose=True, max_tokens=9)
    expected = printed()
    text = generate(ours(VARIANT), tokenizer, "def f(", verbose=True, max_tokens=9)
    assert printed() == expected and text in expected and "Generation: 9 tokens, N tokens-per-sec" in expected
    ended = _with_stop(tokenizer, next(iter(stream_generate(ours(VARIANT), tokenizer, "def f(", 1))).token)
    assert generate(ours(VARIANT), ended, "def f(", verbose=True) == ""
    assert printed() == "==========\n\n==========\nNo text generated for this prompt\n"


def test_a_tokenizer_of_transformers_is_wrapped(tokenizer: TokenizerWrapper, pair: Pair) -> None:
    plain_one = tokenizer._tokenizer
    assert not isinstance(plain_one, TokenizerWrapper)
    assert generate(pair, plain_one, "def f(", max_tokens=9) == generate(pair, tokenizer, "def f(", max_tokens=9)


def test_mlx_computes_on_the_given_stream(tokenizer: TokenizerWrapper, pair: Pair) -> None:
    """And the caller goes on upon its own."""
    expected = generate(pair, tokenizer, "def f(", max_tokens=9)
    stream, before = mx.new_stream(mx.cpu), mx.default_stream(mx.cpu)
    seen = list[mx.Stream]()

    def sampler(logprobs: mx.array) -> mx.array:
        seen.append(mx.default_stream(mx.cpu))
        return mx.argmax(logprobs, axis=-1)

    run = stream_generate(pair, tokenizer, "def f(", 9, None, stream, sampler=sampler)
    text = ""
    for response in run:
        assert mx.default_stream(mx.cpu) == before
        text += response.text
    assert text == expected and seen and all(one == stream for one in seen)


def test_an_unknown_keyword_is_named(tokenizer: TokenizerWrapper, pair: Pair) -> None:
    for call in (
        lambda: stream_generate(pair, tokenizer, "x", temp=0.5),  # type: ignore[call-arg]
        lambda: generate(pair, tokenizer, "x", temp=0.5),
        lambda: list(generate_step([5], pair, temp=0.5)),
    ):
        with pytest.raises(TypeError, match="temp"):
            call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_embeddings": mx.zeros((3, 8))}, "give the prompt as token ids"),
        ({"max_kv_size": 12}, "may become 13 tokens long, more than max_kv_size 12"),
        ({"kv_bits": 8, "quantized_kv_start": 9}, "give quantized_kv_start=0"),
        ({"kv_bits": 3, "quantized_kv_start": 0}, "cannot be held in 3 bits"),
        ({"kv_bits": 8, "quantized_kv_start": 0, "kv_group_size": 128}, "quantised in groups of"),
        ({"draft_model": "small"}, "draft_model is a builtins.str; give what mtp_mlx.load returns"),
    ],
)
def test_what_cannot_be_done_exactly_is_refused(
    options: dict[str, Any], message: str, tokenizer: TokenizerWrapper
) -> None:
    with pytest.raises(RequestError, match=message):
        list(
            stream_generate(
                ours("qwen3_5_tied"), mtp_mlx.load(FIXTURES / VARIANT, drafter=None)[1], varied_tokens(8), 5, **options
            )
        )


def test_other_models_are_refused(tokenizer: TokenizerWrapper, pair: Pair) -> None:
    with pytest.raises(RequestError, match=r"model is a mlx_lm.models.gemma4.*; give what mtp_mlx.load returns for it"):
        _first(stream_generate(theirs(VARIANT), tokenizer, "x"))  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="give a smaller model of the same family"):
        _first(stream_generate(pair, tokenizer, "x", draft_model=ours("qwen3_5_tied")))
    with pytest.raises(RequestError, match="generate_step has no tokenizer for 'x'"):
        next(generate_step("x", pair))  # type: ignore[arg-type]


def test_limits_that_a_text_does_not_reach_change_nothing(tokenizer: TokenizerWrapper) -> None:
    model, prompt = ours("qwen3_5_tied"), varied_tokens(8)
    expected = [response.token for response in stream_generate(model, tokenizer, prompt, 5)]
    unreached: list[dict[str, Any]] = [
        {"max_kv_size": 13},
        {"kv_bits": 8},
        {"kv_bits": 8, "quantized_kv_start": 14},
        {"num_draft_tokens": 3},
    ]
    for options in unreached:
        assert [response.token for response in stream_generate(model, tokenizer, prompt, 5, **options)] == expected


def test_quantised_keys_and_values_are_those_of_a_model_loaded_so(tokenizer: TokenizerWrapper) -> None:
    quantised = Pair(*tiny_pair("qwen3_5_tied"), kv_bits=4)
    asked: dict[str, Any] = {"kv_bits": 4, "kv_group_size": 32, "quantized_kv_start": 0}
    prompt = varied_tokens(30)
    expected = [row for _, row in generate_step(prompt, quantised, max_tokens=8, depth=2)]
    for pair in (quantised, ours("qwen3_5_tied")):
        rows = [row for _, row in generate_step(prompt, pair, max_tokens=8, depth=2, **asked)]
        assert max(gap(mine, other) for mine, other in zip(rows, expected, strict=True)) == 0
    whole = [row for _, row in generate_step(prompt, ours("qwen3_5_tied"), max_tokens=8, depth=2)]
    assert gap(whole[0], expected[0]) > 0


def test_a_smaller_model_drafts_where_it_is_given(tokenizer: TokenizerWrapper) -> None:
    target, small = ours(VARIANT), ours("gemma4_ple")
    prompt = varied_tokens(12)
    expected = [response.token for response in stream_generate(target, tokenizer, prompt, 16, depth=0)]
    found = list(stream_generate(target, tokenizer, prompt, 16, target, num_draft_tokens=3))
    assert [response.token for response in found] == expected
    assert [response.origin for response in found] == (["accepted"] * 3 + ["bonus"]) * 4, "it drafts for itself"
    other = list(stream_generate(target, tokenizer, prompt, 16, small, num_draft_tokens=2))
    assert [response.token for response in other] == expected and other[-1].stats.drafted > 10
    known = target.pair.measured["draft models"]
    assert len(known) == 2 and all(isinstance(drafter, DraftModel) for drafter in known.values())
