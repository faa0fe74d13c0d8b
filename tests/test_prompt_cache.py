"""mlx-lm's prompt caches: read on from, left as mlx-lm would leave them, and handed back and forth."""

import copy
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import pytest
from conftest import (
    FIXTURES,
    QWEN,
    VARIANTS,
    WINDOW,
    AlteredTarget,
    DialledDrafter,
    gap,
    mlx_lm_processors,
    tiny,
    tiny_pair,
    varied_tokens,
)
from faces import theirs
from mlx_lm.generate import BatchGenerator
from mlx_lm.generate import generate_step as their_steps
from mlx_lm.generate import stream_generate as their_stream
from mlx_lm.models.cache import (
    ArraysCache,
    BatchKVCache,
    ChunkedKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)

from mtp_mlx.draft_model import DraftModel
from mtp_mlx.errors import RequestError
from mtp_mlx.generate import generate_step, stream_generate
from mtp_mlx.loading import load
from mtp_mlx.ngram import NOBODY
from mtp_mlx.penalties import Penalties
from mtp_mlx.prompt_cache import stock_caches
from mtp_mlx.sampling import Sample
from mtp_mlx.types import Pair

GEMMA, MIXED = "gemma4_ple", "qwen3_5_tied"  # sliding layers that share keys; recurrent layers and a head
LENGTHS = {"below the window": 5, "into it": WINDOW - 4, "far above it": 40}
CLOSE = 1e-4  # of values that were computed chunk by chunk here and there
TURN = 7  # tokens of a reply

Step = tuple[int, mx.array]
Caches = list[Any]


def pair_of(variant: str) -> Pair:
    return Pair(*tiny_pair(variant))


def mlx_lm_steps(variant: str, prompt: list[int], caches: Caches, tokens: int = TURN) -> list[Step]:
    """What mlx-lm's own model of the same weights writes."""
    steps = their_steps(mx.array(prompt), theirs(variant), max_tokens=tokens, prompt_cache=caches)
    return [(int(token), logprobs) for token, logprobs in steps]


def our_steps(
    pair: Pair, prompt: list[int], caches: Caches, tokens: int = TURN, depth: int = 3, **more: Any
) -> list[Step]:
    return list(generate_step(prompt, pair, max_tokens=tokens, prompt_cache=caches, depth=depth, lookup=False, **more))


def same(ours: list[Step], expected: list[Step]) -> None:
    """Tokens, and the rows they were chosen from: a tiny model may say one token forever."""
    assert [token for token, _ in ours] == [token for token, _ in expected]
    assert max(gap(mine, other) for (_, mine), (_, other) in zip(ours, expected, strict=True)) < CLOSE


def contents(caches: Caches) -> list[tuple[int, list[mx.array]]]:
    """What caches hold that matters to whoever goes on, in the order of time."""
    return [(getattr(cache, "offset", 0), _contents(cache)) for cache in caches]


def _contents(cache: Any) -> list[mx.array]:
    if type(cache) is ArraysCache:
        return list(cast(Any, cache).cache)
    rows = [cache.keys, cache.values]
    if isinstance(cache, RotatingKVCache):
        return [cache._temporal_order(part)[:, :, -min(cache.offset, cache.max_size) :] for part in rows]
    return [part[:, :, : cache.offset] for part in rows]


def alike(caches: Caches, expected: Caches) -> None:
    assert len(caches) == len(expected)
    for (offset, mine), (other_offset, other) in zip(contents(caches), contents(expected), strict=True):
        assert offset == other_offset
        assert max(gap(one, two) for one, two in zip(mine, other, strict=True)) < CLOSE


def own(variant: str, caches: Caches) -> Caches:
    """Those of the target."""
    return caches[: len(stock_caches(tiny_pair(variant)[0]))]


def mlx_lm_has_read(variant: str, text: list[int]) -> Caches:
    """mlx-lm's caches of a text that it has read and of which it has written nothing."""
    caches: Caches = make_prompt_cache(theirs(variant))
    mlx_lm_steps(variant, text, caches, 0)
    return caches


# --------------------------------------------------------------------------- both directions


@pytest.mark.parametrize("variant", [*VARIANTS, *QWEN])
def test_empty_caches_are_those_of_mlx_lms_own_model(variant: str) -> None:
    ours, expected = stock_caches(tiny_pair(variant)[0]), make_prompt_cache(theirs(variant))
    assert [type(cache) for cache in ours] == [type(cache) for cache in expected]
    assert [vars(cache) for cache in ours] == [vars(cache) for cache in expected]


@pytest.mark.parametrize(
    ("variant", "length", "depth"),
    [
        *((variant, length, 3) for variant in (GEMMA, MIXED) for length in LENGTHS),
        *((variant, "into it", 0) for variant in (GEMMA, MIXED)),
        *((variant, "into it", 3) for variant in ("gemma4_keqv", "qwen3_next")),
    ],
)
def test_turns_go_back_and_forth_between_mlx_lm_and_us(variant: str, length: str, depth: int) -> None:
    """Each of the turns by either side; text and caches are those of mlx-lm alone, whoever wrote the turns before."""
    pair, prompts = pair_of(variant), [varied_tokens(LENGTHS[length]), varied_tokens(7, 1), varied_tokens(3, 2)]
    alone: Caches = make_prompt_cache(theirs(variant))
    ours, passed = stock_caches(pair.target), stock_caches(pair.target)
    for turn, prompt in enumerate(prompts):
        expected = mlx_lm_steps(variant, prompt, alone)
        same(our_steps(pair, prompt, ours, depth=depth), expected)
        alike(own(variant, ours), alone)
        by_us = turn % 2 == 0
        steps = our_steps(pair, prompt, passed, depth=depth) if by_us else mlx_lm_steps(variant, prompt, passed)
        same(steps, expected)
        alike(own(variant, passed), alone)


@pytest.mark.parametrize("variant", [GEMMA, MIXED])
def test_a_chat_with_a_cache_is_that_of_a_full_recompute(variant: str) -> None:
    pair, caches, text = pair_of(variant), stock_caches(tiny_pair(variant)[0]), list[int]()
    for turn in range(3):
        prompt = varied_tokens(5 + turn, seed=turn)
        full = list(generate_step(text + prompt, pair, max_tokens=TURN, depth=3, lookup=False))
        same(our_steps(pair, prompt, caches), full)
        text += prompt + [token for token, _ in full]
    assert own(variant, caches)[-1 if variant == GEMMA else 3].offset == len(text)


@pytest.mark.parametrize("variant", [GEMMA, MIXED])
def test_caches_are_saved_and_loaded_by_mlx_lm(variant: str, tmp_path: Path) -> None:
    pair, prompt, more = pair_of(variant), varied_tokens(20), varied_tokens(6, 1)
    ours, others = stock_caches(pair.target), make_prompt_cache(theirs(variant))
    our_steps(pair, prompt, ours)
    mlx_lm_steps(variant, prompt, others)
    files = {name: str(tmp_path / f"{name}.safetensors") for name in ("ours", "theirs")}
    save_prompt_cache(files["ours"], ours, {"model": variant})
    save_prompt_cache(files["theirs"], others)
    expected = mlx_lm_steps(variant, more, others)
    same(mlx_lm_steps(variant, more, load_prompt_cache(files["ours"])), expected)
    same(our_steps(pair, more, load_prompt_cache(files["theirs"])), expected)
    caches, said = load_prompt_cache(files["ours"], return_metadata=True)
    same(our_steps(pair, more, caches), expected)
    assert said == {"model": variant}


def test_a_ring_is_read_wherever_its_oldest_row_stands() -> None:
    """mlx-lm writes single tokens over the oldest ones, and puts the ring in order when a block comes."""
    pair = pair_of(GEMMA)
    seen = set[int]()
    for tokens in (0, 3, WINDOW - 1):
        caches: Caches = make_prompt_cache(theirs(GEMMA))
        mlx_lm_steps(GEMMA, varied_tokens(WINDOW + 3), caches, tokens)
        seen.add(next(cache._idx for cache in caches if isinstance(cache, RotatingKVCache)))
        expected = mlx_lm_steps(GEMMA, varied_tokens(2, 1), copy.deepcopy(caches), 2)
        same(our_steps(pair, varied_tokens(2, 1), caches, 2), expected)
    assert len(seen) == 3


@pytest.mark.parametrize("count", [1, WINDOW - 3])
def test_a_trimmed_cache_goes_on_at_the_earlier_place(count: int) -> None:
    pair, prompt = pair_of(GEMMA), varied_tokens(WINDOW - 6)
    caches, fresh = stock_caches(pair.target), make_prompt_cache(theirs(GEMMA))
    text = prompt + [token for token, _ in our_steps(pair, prompt, caches, 4)]
    assert cast(int, trim_prompt_cache(caches, count)) == count
    mlx_lm_steps(GEMMA, text[:-count], fresh, 0)
    more = varied_tokens(8, 3)
    expected = mlx_lm_steps(GEMMA, more, fresh)
    same(mlx_lm_steps(GEMMA, more, copy.deepcopy(caches)), expected)
    same(our_steps(pair, more, caches), expected)


def test_what_is_trimmed_to_nothing_begins_anew() -> None:
    pair, prompt = pair_of(GEMMA), varied_tokens(5)
    caches = stock_caches(pair.target)
    first = our_steps(pair, prompt, caches, 3)
    assert cast(int, trim_prompt_cache(caches, 8)) == 8
    same(our_steps(pair, prompt, caches, 3), first)


# --------------------------------------------------------------------------- what a text leaves, however it ends


@pytest.fixture(scope="module", params=[GEMMA, MIXED])
def told(request: pytest.FixtureRequest) -> tuple[str, list[int], list[int]]:
    """A variant, a prompt, and what follows it."""
    prompt = varied_tokens(WINDOW - 3)
    truth = mlx_lm_steps(request.param, prompt, make_prompt_cache(theirs(request.param)), 14)
    return request.param, prompt, [token for token, _ in truth]


def test_a_text_that_is_given_up_leaves_the_prompt_and_what_was_given(told: tuple[str, list[int], list[int]]) -> None:
    """At every place of a run of accepted drafts, whether it is closed or has had its number of tokens."""
    variant, prompt, truth = told
    pair = Pair(tiny_pair(variant)[0], DialledDrafter.dial(prompt + truth, 1.0))
    for given in range(1, 7):
        expected = mlx_lm_has_read(variant, prompt + truth[:given])
        for tokens in (given, 14):
            caches = stock_caches(pair.target)
            steps = generate_step(prompt, pair, max_tokens=tokens, prompt_cache=caches, depth=4, lookup=False)
            assert [next(steps)[0] for _ in range(given)] == truth[:given]
            steps.close()
            alike(caches, expected)


def test_a_stop_token_is_the_last_that_is_left(told: tuple[str, list[int], list[int]]) -> None:
    """At every place of an accepted run, as in mlx-lm, whose own function has read the stop token too."""
    variant, prompt, truth = told
    pair = Pair(tiny_pair(variant)[0], DialledDrafter.dial(prompt + truth, 1.0))
    places = [place for place in range(10) if truth[place] not in truth[:place]]
    assert len({place % 5 for place in places}) >= 3, "of a round of five tokens"
    _, tokenizer = load(FIXTURES / "gemma4_keqv", drafter=None)
    for place in places:
        tokenizer.eos_token_ids = {truth[place]}
        caches, others = stock_caches(pair.target), make_prompt_cache(theirs(variant))
        last = list(stream_generate(pair, tokenizer, prompt, 14, depth=4, prompt_cache=caches, lookup=False))[-1]
        *_, expected = their_stream(theirs(variant), tokenizer, prompt, 14, prompt_cache=others)
        assert (last.finish_reason, last.generation_tokens) == (expected.finish_reason, place + 1)
        alike(caches, others)


def test_partial_acceptance_leaves_no_rejected_draft(told: tuple[str, list[int], list[int]]) -> None:
    variant, prompt, truth = told
    for seed in range(2):
        drafter = DialledDrafter.every_partial(prompt + truth, len(prompt), 3, seed)
        caches = stock_caches(tiny_pair(variant)[0])
        our_steps(Pair(tiny_pair(variant)[0], drafter), prompt, caches, 11, depth=3)
        alike(caches, mlx_lm_has_read(variant, prompt + truth[:11]))


def test_an_error_leaves_the_prompt_and_what_was_given(told: tuple[str, list[int], list[int]]) -> None:
    variant, prompt, truth = told
    pair = Pair(tiny_pair(variant)[0], DialledDrafter.dial(prompt + truth, 1.0))
    for fails in (1, 2, 4, 6):
        calls = iter(range(99))

        def sampler(logprobs: mx.array, calls: Iterator[int] = calls, fails: int = fails) -> mx.array:
            if next(calls) == fails:
                raise ArithmeticError("no more")
            return mx.argmax(logprobs, axis=-1)

        caches, given = stock_caches(pair.target), list[int]()
        steps = generate_step(prompt, pair, prompt_cache=caches, depth=3, lookup=False, sampler=sampler)
        with pytest.raises(ArithmeticError, match="no more"):
            for token, _ in steps:
                given.append(token)
        assert given == truth[: len(given)]
        alike(caches, mlx_lm_has_read(variant, prompt + given))


def test_a_round_of_which_nothing_was_given_is_forgotten(
    told: tuple[str, list[int], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error behind the round, where a text is made of its tokens."""
    variant, prompt, truth = told
    pair, given = Pair(tiny_pair(variant)[0], DialledDrafter.dial(prompt + truth, 1.0)), list[int]()

    def add_token(words: object, token: int) -> None:
        if len(given) == 4:
            raise ArithmeticError("no such text")

    _, tokenizer = load(FIXTURES / "gemma4_keqv", drafter=None)
    monkeypatch.setattr(type(tokenizer.detokenizer), "add_token", add_token)
    caches = stock_caches(pair.target)
    with pytest.raises(ArithmeticError, match="no such text"):
        for response in stream_generate(pair, tokenizer, prompt, 14, prompt_cache=caches, depth=3, lookup=False):
            given.append(response.token)
    alike(caches, mlx_lm_has_read(variant, prompt + truth[:4]))


def test_a_prompt_that_is_broken_off_leaves_its_chunks(told: tuple[str, list[int], list[int]]) -> None:
    variant, prompt, truth = told
    pair = pair_of(variant)

    def stop(done: int, total: int) -> None:
        if done == 8:
            raise KeyboardInterrupt

    caches = stock_caches(pair.target)
    with pytest.raises(KeyboardInterrupt):
        our_steps(pair, prompt, caches, prefill_step_size=4, prompt_progress_callback=stop)
    alike(own(variant, caches), mlx_lm_has_read(variant, prompt[:8]))
    assert [token for token, _ in our_steps(pair, prompt[8:], caches)] == truth[:TURN]


def test_no_tokens_at_all_is_reading_the_prompt(told: tuple[str, list[int], list[int]]) -> None:
    variant, prompt, truth = told
    pair, caches, seen = pair_of(variant), stock_caches(tiny_pair(variant)[0]), list[tuple[int, int]]()
    steps = our_steps(
        pair, prompt, caches, 0, prefill_step_size=5, prompt_progress_callback=lambda *done: seen.append(done)
    )
    assert steps == [] and seen == [(0, 13), (5, 13), (10, 13), (12, 13), (13, 13)]
    alike(own(variant, caches), mlx_lm_has_read(variant, prompt))
    assert our_steps(pair, truth[:1], caches)[0][0] == truth[1]


def test_what_was_refused_leaves_the_cache_alone(told: tuple[str, list[int], list[int]]) -> None:
    variant, prompt, _ = told
    pair, caches = pair_of(variant), mlx_lm_has_read(variant, prompt)
    before = copy.deepcopy(caches)
    for bad, message in (([], "prompt is empty"), ([999], "token 999"), ([5] * 1012, "1025 tokens")):
        with pytest.raises(RequestError, match=message):
            our_steps(pair, bad, caches)
    alike(caches, before)


# --------------------------------------------------------------------------- what the drafter knows


def test_a_warm_turn_drafts_from_what_the_head_has_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The head's keys, values and hidden are those of a text read at once; saving and copying keep them."""
    pair, prompt, more = pair_of(MIXED), varied_tokens(12), varied_tokens(6, 1)
    caches = stock_caches(pair.target)
    text = prompt + [token for token, _ in our_steps(pair, prompt, caches)]
    file = str(tmp_path / "saved.safetensors")
    save_prompt_cache(file, caches)
    for warm in (copy.deepcopy(caches), load_prompt_cache(file)):
        whole = stock_caches(pair.target)
        our_steps(pair, text + more, whole)
        our_steps(pair, more, warm)
        (offset, rows), (_, (hidden,)) = contents(warm)[-2:]
        (other_offset, others), (_, (other_hidden,)) = contents(whole)[-2:]
        assert offset == other_offset == len(text + more) + TURN
        # The last slot waits for its partner.
        assert max(gap(mine[:, :, :-1], theirs[:, :, :-1]) for mine, theirs in zip(rows, others, strict=True)) < CLOSE
        assert gap(hidden, other_hidden) < CLOSE and gap(hidden, mx.zeros_like(hidden)) > 0.1
    assert not caplog.records


def test_without_it_drafts_are_blind_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    pair, prompt, more = pair_of(MIXED), varied_tokens(12), varied_tokens(6, 1)
    caches, others = stock_caches(pair.target), make_prompt_cache(theirs(MIXED))
    our_steps(pair, prompt, caches)
    mlx_lm_steps(MIXED, prompt, others)
    expected = mlx_lm_steps(MIXED, more, others)
    stale = copy.deepcopy(caches)
    same(mlx_lm_steps(MIXED, more, stale), expected)  # does not know of the head, whose caches stay behind
    for blind, tokens in ((own(MIXED, caches), 12 + TURN), (stale, 18 + 2 * TURN)):
        caplog.clear()
        steps = our_steps(pair, more, blind)
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert f"drafter has read of its {tokens} tokens" in caplog.text
        if blind is not stale:
            same(steps, expected)
        caplog.clear()
        our_steps(pair, more, blind)
        assert not caplog.records and len(blind) == len(caches), "from now on it is known again"


def test_without_a_drafter_what_a_head_has_read_is_left_behind(caplog: pytest.LogCaptureFixture) -> None:
    pair, prompt = pair_of(MIXED), varied_tokens(12)
    caches = stock_caches(pair.target)
    our_steps(pair, prompt, caches)
    our_steps(Pair(pair.target, NOBODY), prompt, caches, depth=0)
    assert not caplog.records
    our_steps(pair, prompt, caches)
    assert "fewer drafts" in caplog.text


def test_mlx_lm_reads_several_texts_on_in_a_batch() -> None:
    pair = pair_of(MIXED)
    prompts, more = [varied_tokens(12), varied_tokens(7, 3)], [varied_tokens(4, 8), varied_tokens(4, 9)]
    caches = [stock_caches(pair.target) for _ in prompts]
    for prompt, held in zip(prompts, caches, strict=True):
        our_steps(pair, prompt, held)
    expected = [mlx_lm_steps(MIXED, tokens, copy.deepcopy(held), 6) for tokens, held in zip(more, caches, strict=True)]
    generator = BatchGenerator(theirs(MIXED), max_tokens=6)
    uids = generator.insert(more, caches=copy.deepcopy(caches))
    written: dict[int, list[int]] = {uid: [] for uid in uids}
    while responses := generator.next_generated():
        for response in responses:
            written[response.uid].append(response.token)
    assert [written[uid] for uid in uids] == [[token for token, _ in steps] for steps in expected]


def test_a_draft_models_caches_are_taken_where_mlx_lm_has_them(caplog: pytest.LogCaptureFixture) -> None:
    """Behind the target's, as mlx-lm's own functions expect them; a warm turn drafts as well as a cold one then."""
    target, _ = tiny("gemma4_keqv")
    small, _ = tiny("gemma4_ple")
    pair, prompt, more = Pair(target, DraftModel(small)), varied_tokens(12), varied_tokens(8, 1)
    caches = stock_caches(target) + stock_caches(small)
    first = our_steps(pair, prompt, caches)
    text, fresh = prompt + [token for token, _ in first], stock_caches(target) + stock_caches(small)
    our_steps(pair, text + more, fresh)
    our_steps(pair, more, caches)
    assert not caplog.records
    alike(caches, fresh)
    alone = stock_caches(target)
    same(our_steps(pair, prompt, alone), first)
    assert len(alone) == len(stock_caches(target)), "mlx-lm's Gemma would take them for its own layers'"
    our_steps(pair, more, alone)
    assert f"drafter has read of its {12 + TURN} tokens" in caplog.text


def test_a_draft_model_that_was_to_read_a_round_later_begins_anew(caplog: pytest.LogCaptureFixture) -> None:
    """Of a round that is given up in the middle: what it has read is not what the caches are to hold."""
    target, _ = tiny("gemma4_keqv")
    pair, prompt, more = Pair(target, DraftModel(target)), varied_tokens(12), varied_tokens(8, 1)
    caches = stock_caches(target) + stock_caches(target)
    steps = generate_step(prompt, pair, prompt_cache=caches, depth=3, lookup=False)
    text = prompt + [next(steps)[0] for _ in range(2)]
    steps.close()
    assert [cache.offset for cache in caches] == [14] * (len(caches) // 2) + [0] * (len(caches) // 2)
    expected = list(generate_step(text + more, pair, max_tokens=TURN, depth=3, lookup=False))
    same(our_steps(pair, more, caches), expected)
    assert "drafter has read of its 14 tokens" in caplog.text


# --------------------------------------------------------------------------- quantised


def test_quantised_caches_go_back_and_forth() -> None:
    variant = "qwen3_5_tied"
    pair, prompt, more = pair_of(variant), varied_tokens(12), varied_tokens(6, 1)
    others: Caches = make_prompt_cache(theirs(variant))
    step: dict[str, Any] = {"kv_bits": 8, "kv_group_size": 32}
    list(
        their_steps(
            mx.array(prompt), theirs(variant), max_tokens=TURN, prompt_cache=others, quantized_kv_start=0, **step
        )
    )
    assert any(isinstance(cache, QuantizedKVCache) for cache in others)
    expected = mlx_lm_steps(variant, more, copy.deepcopy(others))
    ours = our_steps(pair, more, others)
    assert [token for token, _ in ours] == [token for token, _ in expected]
    assert max(gap(mine, other) for (_, mine), (_, other) in zip(ours, expected, strict=True)) < 0.05
    assert any(isinstance(cache, QuantizedKVCache) for cache in own(variant, others))
    mine = stock_caches(pair.target)
    our_steps(pair, prompt, mine, quantized_kv_start=0, **step)
    kinds = {type(cache) for cache in own(variant, mine)}
    assert kinds == {ArraysCache, QuantizedKVCache}
    following = our_steps(pair, more, copy.deepcopy(mine))
    assert [token for token, _ in following] == [token for token, _ in mlx_lm_steps(variant, more, mine)]
    with pytest.raises(RequestError, match="kv_bits is 4, the prompt cache has 8"):
        our_steps(pair, more, mine, kv_bits=4)


# --------------------------------------------------------------------------- what is refused


def _ring(size: int, keep: int = 0) -> Caches:
    caches = stock_caches(tiny_pair(GEMMA)[0])
    return [RotatingKVCache(size, keep) if isinstance(cache, RotatingKVCache) else cache for cache in caches]


def _read(variant: str, change: int, replacement: Any) -> Caches:
    caches = mlx_lm_has_read(variant, varied_tokens(6))
    caches[change] = replacement
    return caches


def _padded() -> Caches:
    caches = mlx_lm_has_read(MIXED, varied_tokens(6))
    caches[0].lengths = mx.array([3])
    return caches


def _uneven() -> Caches:
    caches = mlx_lm_has_read(GEMMA, varied_tokens(6))
    caches[0].trim(1)
    return caches


@pytest.mark.parametrize(
    ("variant", "caches", "message"),
    [
        (GEMMA, lambda: [KVCache()], "has 1 entries, this model's has"),
        (MIXED, lambda: [*stock_caches(tiny_pair(MIXED)[0]), KVCache()], "5 entries.* has 4, or 6 with"),
        (GEMMA, lambda: tuple(stock_caches(tiny_pair(GEMMA)[0])), "is a tuple; give a list"),
        (GEMMA, lambda: [KVCache() for _ in stock_caches(tiny_pair(GEMMA)[0])], "is a KVCache, expected a Rot"),
        (GEMMA, lambda: [BatchKVCache([0]) for _ in range(9)], "is a BatchKVCache.*one text, not of a batch"),
        (GEMMA, lambda: [ChunkedKVCache(8) for _ in range(9)], "entry 0 .* is a ChunkedKVCache"),
        (GEMMA, lambda: _ring(8), "keeps the first 0 of 8 tokens, this model's the first 0 of 16"),
        (GEMMA, lambda: _ring(WINDOW, 4), "keeps the first 4 of 16"),
        (GEMMA, _uneven, r"different numbers of tokens: \[5, 6\]"),
        (MIXED, _padded, "entry 0 of the prompt cache is of a batch"),
        (MIXED, lambda: _read(MIXED, 0, ArraysCache(2)), "holds 6 tokens, but its entry 0 nothing"),
        (MIXED, lambda: mlx_lm_has_read("qwen3_next", varied_tokens(6)) * 2, "entry|made with another model"),
    ],
)  # fmt: skip
def test_a_cache_that_does_not_fit_is_refused(variant: str, caches: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        our_steps(pair_of(variant), varied_tokens(4), caches())


def test_a_cache_of_another_model_is_refused() -> None:
    pair, caches = pair_of(MIXED), mlx_lm_has_read(MIXED, varied_tokens(6))
    keys, values, offset = caches[3].state
    caches[3].state = (keys[..., :16], values[..., :16], offset)
    with pytest.raises(RequestError, match=r"layer 3 of the prompt cache holds arrays of shapes.*another model"):
        our_steps(pair, [4], caches)


def test_the_context_counts_what_the_cache_holds() -> None:
    target = AlteredTarget(tiny_pair(GEMMA)[0], context=40)
    caches = mlx_lm_has_read(GEMMA, varied_tokens(30))
    assert len(our_steps(Pair(target, NOBODY), varied_tokens(4), caches, -1, depth=0)) == 40 - 34


def test_processors_are_shown_this_prompt_and_no_other() -> None:
    """As in mlx-lm, where nobody knows what a cache was made of either."""
    prompt, more = varied_tokens(12), varied_tokens(5, 1)
    seen = list[list[int]]()

    def processor(tokens: mx.array, logits: mx.array) -> mx.array:
        seen.append(cast(list[int], tokens.tolist()))
        return logits

    for depth in (0, 3):
        seen.clear()
        steps = our_steps(
            pair_of(MIXED), more, mlx_lm_has_read(MIXED, prompt), depth=depth, logits_processors=[processor]
        )
        text = more + [token for token, _ in steps]
        assert seen == [text[:n] for n in range(len(more), len(text))]


def test_penalties_do_not_know_what_the_cache_was_made_of() -> None:
    caches = mlx_lm_has_read(MIXED, varied_tokens(12))
    more, penalties = varied_tokens(5, 1), Penalties(repetition=1.5)
    model, chain = theirs(MIXED), mlx_lm_processors(penalties)
    held = copy.deepcopy(caches)
    steps = their_steps(mx.array(more), model, max_tokens=12, prompt_cache=held, logits_processors=chain)
    expected = [(int(token), row) for token, row in steps]
    for depth in (0, 3):
        same(our_steps(pair_of(MIXED), more, copy.deepcopy(caches), 12, depth, penalties=penalties), expected)


def test_a_seed_writes_the_same_text_behind_a_cache() -> None:
    pair, prompt, more = pair_of(MIXED), varied_tokens(9), varied_tokens(5, 1)
    options: dict[str, Any] = {"depth": 3, "seed": 3, "sampler": Sample(0.9)}
    expected = [token for token, _ in generate_step(prompt + more, pair, max_tokens=TURN, **options)]
    found = our_steps(pair, more, mlx_lm_has_read(MIXED, prompt), **options)
    assert [token for token, _ in found] == expected
