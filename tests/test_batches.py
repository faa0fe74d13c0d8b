"""`batch_generate`: each text is what `stream_generate` writes for its prompt alone."""

import gc
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import mlx.core as mx
import pytest
from conftest import FIXTURES, WINDOW, varied_tokens
from mlx_lm.models.cache import KVCache
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mtp_mlx.batches import Figures, _Results, batch_generate
from mtp_mlx.cache import Cache
from mtp_mlx.errors import BusyError, RequestError
from mtp_mlx.generate import stream_generate
from mtp_mlx.generation import Generation, Writing, generation
from mtp_mlx.loading import load
from mtp_mlx.ngram import NOBODY
from mtp_mlx.options import Options
from mtp_mlx.penalties import Penalties
from mtp_mlx.prefixes import Prefixes
from mtp_mlx.prompt_cache import PromptCache, Text
from mtp_mlx.sampling import Greedy, Sample
from mtp_mlx.together import Pace, Together
from mtp_mlx.types import Pair

Loaded = tuple[Pair, TokenizerWrapper]
LENGTHS = [1, 3 * WINDOW, 5, WINDOW, WINDOW + 1, 2, WINDOW - 1, 2 * WINDOW]
TOKENS = [9, 30, 1, 2, 25, 12, 30, 3]


@pytest.fixture(scope="module", params=["gemma4_keqv", "qwen3_5_tied"])
def loaded(request: pytest.FixtureRequest) -> Loaded:
    drafter = FIXTURES / request.param / "assistant"
    model, tokenizer = load(FIXTURES / request.param, drafter=drafter if drafter.is_dir() else "auto", dtype=mx.float32)
    return model.pair, tokenizer


def _alone(loaded: Loaded, prompt: list[int], tokens: int, **options: object) -> list[int]:
    responses = stream_generate(*loaded, prompt, tokens, **options)  # type: ignore[arg-type]
    return [response.token for response in responses if response.finish_reason != "stop"]


@pytest.mark.parametrize("depth", [0, 3, "auto"])
@pytest.mark.parametrize("rows", [1, 2, 8])
def test_greedy_texts_are_those_of_each_prompt_alone(
    loaded: Loaded, sizes: list[int], rows: int, depth: int | str
) -> None:
    prompts = [varied_tokens(length, seed=length) for length in LENGTHS[:rows]]
    pair = replace(loaded[0], measured={})
    result = batch_generate(pair, loaded[1], prompts, max_tokens=TOKENS[:rows], return_token_ids=True, depth=depth)
    assert max(sizes) > 3 * rows // 5, "some have ended before the last one joins"
    assert result.token_ids == [
        _alone(loaded, prompt, tokens, depth=0) for prompt, tokens in zip(prompts, TOKENS, strict=False)
    ]


@pytest.mark.parametrize("depth", [0, 3])
def test_every_text_has_its_own_sampler_seed_and_penalties(loaded: Loaded, sizes: list[int], depth: int) -> None:
    samplers = [None, Sample(0.8), Sample(1.2, top_p=0.9), Greedy(), make_sampler(0.0), Sample(0.8), None, Sample(2.0)]
    penalties = [None, Penalties(repetition=1.4), None, Penalties(presence=0.5), None, None, None, None]
    processors = [None] * 6 + [make_logits_processors(logit_bias={3: 4.0}), None]
    prompts = [varied_tokens(length, seed=length) for length in LENGTHS]
    result = batch_generate(
        *loaded,
        prompts,
        max_tokens=20,
        return_token_ids=True,
        sampler=samplers,
        penalties=penalties,
        logits_processors=processors,  # type: ignore[arg-type]
        seed=7,
        depth=depth,
    )
    assert max(sizes) == 8 and result.token_ids is not None
    for row, prompt in enumerate(prompts):
        own = {"sampler": samplers[row], "penalties": penalties[row], "logits_processors": processors[row]}
        assert result.token_ids[row] == _alone(loaded, prompt, 20, seed=7 + row, depth=depth, **own)


def test_a_seeded_text_that_depends_on_its_drafts_is_written_alone(loaded: Loaded, sizes: list[int]) -> None:
    """In a batch its depths would follow a clock, and with them the text."""
    prompts = [varied_tokens(length, seed=length) for length in (5, 9)]
    absent: Any = None
    cases = [Options(seed=1, drafts=Sample(0.9)), Options(seed=1, drafts="coupled"), Options(drafts=Sample(0.9))]
    writings = [Writing(absent, absent, absent, absent, options, absent) for options in cases]
    assert [writing.solitary for writing in writings] == [True, False, False]
    batch_generate(*loaded, prompts, max_tokens=5, sampler=Sample(0.9), seed=[1, 2], depth=2)
    assert max(sizes) == 2


def test_texts_end_at_stops_and_others_take_their_place(loaded: Loaded, sizes: list[int]) -> None:
    tokenizer = loaded[1]
    prompts = [varied_tokens(length, seed=length) for length in LENGTHS]
    free = [_alone(loaded, prompt, 24, depth=0) for prompt in prompts]
    stops = {text[i] for i, text in zip((3, 8, 15), free, strict=False)}
    with mock.patch.object(type(tokenizer), "eos_token_ids", stops, create=True):
        result = batch_generate(
            *loaded, prompts, max_tokens=24, return_token_ids=True, depth=4, completion_batch_size=3
        )
    ends = [next((i for i, token in enumerate(text) if token in stops), 24) for text in free]
    assert result.token_ids == [text[:end] for text, end in zip(free, ends, strict=True)]
    assert len(set(ends)) > 2 and max(sizes) == 3
    assert result.texts == [tokenizer.decode(ids) for ids in result.token_ids]


@pytest.mark.parametrize("depth", [0, 2])
def test_a_batch_that_nobody_joins_or_leaves_is_not_copied(loaded: Loaded, sizes: list[int], depth: int) -> None:
    """A round costs a copy of nothing, and a drafter that is not asked is told of many rounds at once."""
    prompts = [varied_tokens(5, seed=row) for row in range(3)]
    options = Options(40, depth)
    with mock.patch.object(Cache, "select", autospec=True, side_effect=Cache.select) as select:
        texts = [partial(generation, *loaded, prompt, options, Prefixes(loaded[0], 0)) for prompt in prompts]
        list(Together(loaded[0], Pace()).write(texts, 3))
    together = sum(size > 1 for size in sizes)
    assert together > 9 and select.call_count < together / 2


def test_the_response_is_mlx_lm_s(loaded: Loaded, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = [varied_tokens(5), varied_tokens(9, seed=2)]
    result = batch_generate(*loaded, prompts, max_tokens=6, verbose=True, return_logprobs=True, depth=2)
    assert isinstance(result.stats, Figures) and result.stats.drafted >= result.stats.accepted
    assert result.stats.prompt_tokens == 14 and result.stats.generation_tokens == 12
    assert result.token_ids is None and result.caches is None
    assert result.logprobs is not None
    for row, prompt in enumerate(prompts):
        responses = list(stream_generate(*loaded, prompt, 6, depth=0))
        told = [response.logprobs[response.token].item() for response in responses]
        assert result.logprobs[row] == pytest.approx(told, abs=2e-4)
    printed = capsys.readouterr().out
    assert "Finished processing 2/2" in printed and "Generation: 12 tokens" in printed
    empty = batch_generate(*loaded, [])
    assert empty.texts == []


@pytest.mark.parametrize("depth", [0, 3])
def test_prompt_caches_are_gone_on_from_and_returned(loaded: Loaded, sizes: list[int], depth: int) -> None:
    """Those that were given stay as they are; those that come back hold all that was read and given."""
    prompts = [varied_tokens(length, seed=length) for length in LENGTHS[:4]]
    first = batch_generate(*loaded, prompts, max_tokens=[5, 9, 6, 12], return_prompt_caches=True, return_token_ids=True)
    assert first.caches is not None and first.token_ids is not None
    read = [prompt + ids for prompt, ids in zip(prompts, first.token_ids, strict=True)]
    held = [next(int(cache.offset) for cache in caches if type(cache) is KVCache) for caches in first.caches]
    assert held == [len(text) for text in read]
    more = [varied_tokens(7, seed=row) for row in range(4)]
    for _ in range(2):
        second = batch_generate(
            *loaded, more, prompt_caches=first.caches, max_tokens=10, return_token_ids=True, depth=depth
        )
        whole = [text + extra for text, extra in zip(read, more, strict=True)]
        assert second.token_ids == [_alone(loaded, text, 10, depth=0) for text in whole]
    assert max(sizes) == 4


def test_a_fault_is_told_of_even_where_others_were_in_the_middle_of_a_round(loaded: Loaded, sizes: list[int]) -> None:
    """What would be left in prompt caches is of no use to anybody then."""
    calls = 0

    def faulty(tokens: mx.array, logits: mx.array) -> mx.array:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise ZeroDivisionError("a fault of the caller's")
        return logits

    prompts = [varied_tokens(9, seed=row + 1) for row in range(4)]
    processors: Any = [[faulty], None, None, None]
    pair = replace(loaded[0], measured={})
    with pytest.raises(ZeroDivisionError):
        batch_generate(pair, loaded[1], prompts, logits_processors=processors, depth=2, return_prompt_caches=True)
    assert sizes[-1] > 1


def test_a_text_that_has_ended_holds_nothing(loaded: Loaded) -> None:
    """The log-probabilities of its last round are of a whole batch."""
    held: dict[int, int] = {}
    for count in (8, 40):
        with mock.patch.object(_Results, "response", lambda *_: mx.get_active_memory()):
            gc.collect()
            before = mx.get_active_memory()
            prompts = [varied_tokens(9, seed=row) for row in range(count)]
            after: Any = batch_generate(*loaded, prompts, max_tokens=6, depth=0, completion_batch_size=8)
            held[count] = after - before
    assert held[40] - held[8] < 32 * 320 * 4


def test_texts_with_prompt_caches_know_of_each_other_s_memory(loaded: Loaded, sizes: list[int]) -> None:
    """One for which there is none yet waits until another has ended."""
    pair, _ = loaded
    needed = pair.target.kv_bytes(60) + pair.drafter.kv_bytes(60)
    texts: list[Text] = []

    def free() -> int:
        return int(1.5 * needed) - sum(text.sequence.nbytes for text in texts)

    def opened(self: PromptCache, *arguments: Any) -> Text:
        nonlocal texts
        texts = self.texts
        return plain(self, *arguments)

    plain = PromptCache.open
    prompts = [varied_tokens(20, seed=row + 1) for row in range(3)]
    with mock.patch("mtp_mlx.memory.free_bytes", free), mock.patch.object(PromptCache, "open", opened):
        pair = replace(pair, measured={})
        result = batch_generate(pair, loaded[1], prompts, max_tokens=12, return_prompt_caches=True, depth=2)
    assert result.caches is not None and max(sizes) == 1 and not texts


def test_what_does_not_fit_is_refused(loaded: Loaded) -> None:
    for options, word in (
        ({"max_tokens": [3]}, "max_tokens has 1 entries for 2 prompts"),
        ({"seed": [1, 2, 3]}, "seed has 3 entries"),
        ({"sampler": [None]}, "sampler has 1"),
        ({"completion_batch_size": 0}, "at least 1"),
        ({"prefill_batch_size": 0}, "at least 1"),
        ({"max_kv_size": 64}, "max_kv_size is 64; leave it out"),
        ({"logits_processors": [[], len]}, "not both"),
        ({"prompt_caches": [[]]}, "prompt_caches has 1 entries"),
        ({"prompt_caches": [[], []]}, "the prompt cache has 0 entries"),
        ({"max_tokens": 0}, "max tokens is 0"),
    ):
        with pytest.raises(RequestError, match=word):
            batch_generate(*loaded, [[1], [2]], **options)
    with pytest.raises(RequestError, match="the prompt is empty"):
        batch_generate(*loaded, [[1], []])


def test_a_text_for_which_there_is_no_memory_waits_until_another_has_ended(loaded: Loaded, sizes: list[int]) -> None:
    begun: list[Prefixes] = []

    def busy(*arguments: Any) -> Generation:
        prefixes = arguments[4]
        if prefixes.claims.held:
            raise BusyError("other texts have the memory")
        begun.append(prefixes)
        return (yield from generation(*arguments))

    prompts = [varied_tokens(4, seed=row) for row in range(3)]
    with mock.patch("mtp_mlx.batches.generation", busy):
        result = batch_generate(*loaded, prompts, max_tokens=12, return_token_ids=True, depth=2)
    assert max(sizes) == 1 and begun == begun[:1] * 3, "they share what knows of memory"
    assert result.token_ids == [_alone(loaded, prompt, 12, depth=0) for prompt in prompts]


def test_what_loses_is_found_out_and_written_in_turn(loaded: Loaded) -> None:
    """A batch that takes as long as its rows one by one and more is given up, and tried again much later."""
    pair, _ = loaded
    together = Together(Pair(pair.target, pair.drafter))
    pace = together._pace
    assert pace.together(4)
    for _ in range(40):
        pace.add(4, 4, 10.0)
    assert not pace.together(4), "what one after the other brings is not known"
    for _ in range(40):
        pace.add(1, 1, 1.0)
    assert not pace.together(4) and pace.together(3)
    for _ in range(600):
        pace.add(1, 1, 1.0)
    assert pace.together(4), "it is tried once more"
    for _ in range(80):
        pace.add(4, 4, 1.0)
    assert pace.together(4)


def test_a_pair_with_another_drafter_is_measured_by_itself(loaded: Loaded) -> None:
    pair = replace(loaded[0], measured={})
    assert Together(replace(pair, drafter=NOBODY))._policy(2, "auto") != Together(pair)._policy(2, "auto")
    assert Together(pair)._policy(2, "auto") is Together(pair)._policy(2, "auto")


def test_one_hiccup_does_not_rule_a_way_out_for_long() -> None:
    """Depths that a batch has not run before are traced, which may take as long as hundreds of rounds."""
    pace = Pace()
    for number in range(1400):
        together = pace.together(4)
        pace.add(4 if together else 1, 4 if together else 1, 3000.0 if number == 3 else 1.0)
    assert pace.together(4) and pace.rates[4].pace > 3


def test_texts_of_very_different_length_are_not_written_together(loaded: Loaded) -> None:
    together = Together(loaded[0])
    writings: list[Any] = [
        SimpleNamespace(
            options=Options(depth=3),
            solitary=False,
            sequence=SimpleNamespace(
                pair=loaded[0],
                ready=True,
                nbytes=capacity,
                batch=SimpleNamespace(cache=SimpleNamespace(capacity=capacity)),
            ),
        )
        for capacity in (256, 300, 5000, 9000, 11000)
    ]
    short, other, middle, long, longest = writings
    assert together.company(writings) == [short, other]
    assert together.company([longest, short, middle, long]) == [longest, long]
    long.sequence.ready = False
    assert together.company([longest, long]) == [longest], "a drafter that has not been told cannot draft"
    other.solitary = True
    assert together.company([short, other]) == [short]
    other.solitary, other.options = False, Options(depth=2)
    assert together.company([short, other]) == [short]
    with mock.patch("mtp_mlx.memory.free_bytes", lambda: 3000):
        assert together.company([middle, long]) == [middle] and together.company([longest, middle]) == [longest]
