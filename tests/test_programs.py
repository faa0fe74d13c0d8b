"""Replayed rounds are the rounds as they are built, and nothing is copied on the way."""

from dataclasses import dataclass, field

import mlx.core as mx
import pytest
from conftest import (
    WINDOW,
    DialledDrafter,
    Forced,
    certain,
    gap,
    needs_compiler,
    rows_of,
    run_rounds,
    tiny_pair,
    varied_tokens,
)
from test_rounds import EXACT

from mtp_mlx.batch import Round
from mtp_mlx.cache import Cache, FullCache, RecurrentCache, SlidingCache
from mtp_mlx.choosing import Drafts, Rules
from mtp_mlx.programs import Programs, compiles
from mtp_mlx.sampling import Greedy, Sample
from mtp_mlx.sequence import Sequence
from mtp_mlx.types import Output, Pair, Pick, Span, State


@needs_compiler
@pytest.mark.parametrize("variant", ["gemma4_keqv", "qwen3_5_tied"])
def test_replayed_rounds_equal_rounds_as_they_are_built(variant: str, compiled: None) -> None:
    target, drafter = tiny_pair(variant)
    text = varied_tokens(330, seed=3)
    forced = Forced(mx.array(text + [0] * 20))
    partial: set[int] = set()
    for start, count in ((5, 60), (230, 60)):  # the second one grows its buffers on the way
        for own, k in ((DialledDrafter.dial(text, 0.7), 3), (drafter, 2)):
            mx.disable_compile()
            _, expected, _ = run_rounds(target, DialledDrafter.dial([], 0.0), forced, text[:start], count, 0)
            mx.enable_compile()
            tokens, rows, accepted = run_rounds(target, own, forced, text[:start], count, k)
            assert tokens == text[start : start + count] and gap(rows, expected) < EXACT
            partial |= set(accepted)
    assert partial == {0, 1, 2, 3}


@needs_compiler
@pytest.mark.parametrize("variant", ["gemma4_keqv", "qwen3_5_tied"])
@pytest.mark.parametrize("drafts", ["coupled", Sample(0.5)])
def test_sampled_text_does_not_depend_on_being_replayed(variant: str, drafts: Drafts, compiled: None) -> None:
    """Keys are made of seed and position inside the trace; nothing of one round is baked into the next."""
    target, drafter = tiny_pair(variant)
    prompt = varied_tokens(20)
    texts = []
    for replay in (True, False):
        (mx.enable_compile if replay else mx.disable_compile)()
        for seed in (1, 2):
            texts.append(
                run_rounds(target, drafter, Sample(1.2, top_p=0.9), prompt, 30, 2, seed=seed, drafts=drafts)[0]
            )
    assert texts[0] == texts[2] and texts[1] == texts[3] and texts[0] != texts[1]


@dataclass
class Toy:
    """A target whose layers hold much and compute little: every layer stores the token's own value."""

    layers: tuple[FullCache | SlidingCache, ...]
    slots: int
    context: int = 2**20
    vocabulary: int = 320
    nbytes: int = 0
    calls: list[int] = field(default_factory=list)

    def kv_bytes(self, tokens: int, kv_bits: int | None = None) -> int:
        return 0

    def make_cache(self, kv_bits: int | None = None) -> Cache:
        cache = Cache(list(self.layers))
        cache.reserve(self.slots)
        return cache

    def embed(self, tokens: mx.array) -> mx.array:
        return mx.broadcast_to(tokens[..., None].astype(mx.float32), (*tokens.shape, 8))

    def __call__(self, tokens: mx.array, cache: Cache, span: Span) -> Output:
        self.calls.append(span.length)
        rows = mx.broadcast_to(tokens[:, None, :, None].astype(mx.float32), (tokens.shape[0], 4, span.length, 128))
        seen = [cache.attention(i).write(rows, rows, span) for i in range(len(self.layers))]
        newest = mx.zeros(tokens.shape[0])
        for rows_seen in map(rows_of, seen):
            newest = newest + rows_seen.keys[:, 0, 3, 0] + rows_seen.values[:, 0, 3, 0]
        logits = certain(((tokens + 1) % self.vocabulary).reshape(-1, 1)).reshape(*tokens.shape, -1)
        return Output(logits + 0 * newest.reshape(-1, 1, 1), self.embed(tokens))


@dataclass(frozen=True)
class Reader:
    """A drafter that reads the target's buffers in place, as the assistant does, and is right half of the time."""

    limit: int = 31
    reads_prompt: bool = True
    nbytes: int = 0

    def kv_bytes(self, tokens: int) -> int:
        return 0

    def reads(self, cache: Cache) -> int:
        return sum(array.nbytes for layer in cache.layers for array in layer.arrays())

    def start(self, cache: Cache) -> State:
        return ()

    def advance(
        self, state: State, cache: Cache, tokens: mx.array, span: Span, hidden: mx.array, count: mx.array
    ) -> State:
        return (mx.take_along_axis(hidden, count[:, None, None], axis=1),)

    def draft(self, state: State, cache: Cache, last: mx.array, k: int, pick: Pick) -> None:
        token = last[:, None]
        for _ in range(k):
            looked_at = sum(rows_of(cache.attention(i).stored()).keys[:, 0, :4].sum() for i in range(len(cache.layers)))
            token = pick(certain((token + 1 + (token % 5 == 0)) % 320) + 0 * looked_at)


SLOTS = 32768  # x 4 heads x 128 x 4 bytes = 64 MB a buffer
BUFFER = SLOTS * 4 * 128 * 4


@needs_compiler
@pytest.mark.parametrize("replay", [True, False])
@pytest.mark.parametrize("k", [0, 3])
def test_no_buffer_is_copied_whatever_a_round_does(replay: bool, k: int, compiled: None) -> None:
    """One copy of one of the four buffers of 64 MB would show in the peak."""
    if not replay:
        mx.disable_compile()
    target = Toy((FullCache(), SlidingCache(SLOTS)), SLOTS)
    sequence = Sequence(Pair(target, Reader()), Rules())
    sequence.prefill([1, 2, 3, 4, 5], 4, lambda done, total: None)
    for _ in range(3):
        sequence.round(k)
    held = sum(array.nbytes for layer in target.layers for array in layer.arrays())
    assert held > 3.9 * BUFFER
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    accepted = {sequence.round(k).accepted for _ in range(12)}
    assert mx.get_peak_memory() - before < BUFFER / 4
    assert accepted == {0} if k == 0 else len(accepted) > 1


@needs_compiler
@pytest.mark.parametrize("k", [0, 3])
def test_no_buffer_of_a_batch_is_copied(k: int, compiled: None) -> None:
    target = Toy((FullCache(), SlidingCache(SLOTS // 2)), SLOTS // 2)
    texts = []
    for first in (1, 40):
        target.layers = (FullCache(), SlidingCache(SLOTS // 2))
        texts.append(Sequence(Pair(target, Reader()), Rules()))
        texts[-1].prefill(list(range(first, first + 5)), 4, lambda done, total: None)
    batch = texts[0].batch
    batch.join(texts[1].batch)
    for _ in range(3):
        batch.round(k)
    assert batch.cache.nbytes > 3.9 * BUFFER
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    rounds = [result for _ in range(12) for result in batch.round(k) if isinstance(result, Round)]
    assert mx.get_peak_memory() - before < BUFFER / 4
    assert len(rounds) == 24 and texts[1].text == [(40 + i) % 320 for i in range(len(texts[1].text))]
    assert {result.accepted for result in rounds} == {0} if k == 0 else len({result.accepted for result in rounds}) > 1


@needs_compiler
def test_replayed_rounds_of_a_batch_equal_rounds_as_they_are_built(compiled: None) -> None:
    target, drafter = tiny_pair("gemma4_keqv")

    def written() -> list[list[int]]:
        pair = Pair(target, drafter)
        texts = [Sequence(pair, Rules(Sample(0.9), drafts=Sample(0.8)), seed) for seed in range(3)]
        for sequence, length in zip(texts, (5, WINDOW, 3 * WINDOW), strict=True):
            sequence.prefill(varied_tokens(length, seed=length), WINDOW, lambda done, total: None)
            sequence.round(0)
        for sequence in texts[1:]:
            texts[0].batch.join(sequence.batch)
        for k in (3, 2, 3, 0, 3, 3, 2, 0):
            texts[0].batch.round(k)
        return [sequence.text for sequence in texts]

    replayed = written()
    mx.disable_compile()
    assert written() == replayed


@needs_compiler
def test_a_step_is_traced_once_for_each_depth_and_size(compiled: None) -> None:
    target = Toy((FullCache(),), 512)
    pair = Pair(target, Reader())
    traced: list[list[int]] = []
    for _ in range(2):  # sequences share what has been traced
        target.layers = (FullCache(),)
        sequence = Sequence(pair, Rules())
        sequence.prefill([1, 2, 3, 4, 5, 6, 7], 4, lambda done, total: None)
        target.calls.clear()
        for k in (0, 3, 0, 3, 3, 0, 2, 3, 2):
            sequence.round(k)
        sequence.cache.reserve(1000)
        sequence.round(3)
        sequence.round(3)
        traced.append(target.calls.copy())
    assert traced == [[1, 4, 3, 4], []]


@needs_compiler
def test_a_failed_trace_leaves_a_sequence_as_it_was(compiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    target, drafter = tiny_pair("gemma4_keqv")
    sequence = Sequence(Pair(target, drafter), Rules())
    sequence.prefill(varied_tokens(20), 16, lambda done, total: None)
    first = sequence.round(0).tokens

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FullCache, "mask", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sequence.round(2)
    expected = run_rounds(target, drafter, Greedy(), varied_tokens(20), 9, 2)[0]
    while len(first) < 9:
        first += sequence.round(2).tokens
    assert first[:9] == expected


def test_old_traces_make_room_for_new_ones() -> None:
    programs = Programs()
    cache = Cache([])
    for number in range(100):
        programs.run(lambda model, cache, fixed, x: x + fixed, Reader(), cache, number, mx.array(1))
    assert len(programs._traced) == 64


def test_without_a_compiler_rounds_are_built_each_time() -> None:
    mx.disable_compile()
    compiles.cache_clear()
    assert not compiles()


def test_what_a_cache_holds_can_be_taken_out_and_put_back() -> None:
    for layer in (FullCache(), SlidingCache(8), RecurrentCache(4)):
        assert layer.arrays() == []
        layer.bind([])
        assert layer.arrays() == []


@needs_compiler
@pytest.mark.usefixtures("compiled")
def test_a_quantised_cache_of_a_second_sequence_is_replayed_from_its_first_token() -> None:
    """Nothing of a prompt of one token is read before the first replay, so nothing could be noted while tracing."""
    target, drafter = tiny_pair("gemma4_keqv")
    first = run_rounds(target, drafter, Greedy(), [5], 8, 1, kv_bits=8)
    second = run_rounds(target, drafter, Greedy(), [5], 8, 2, kv_bits=8)
    assert first[0] == second[0]


def test_a_growing_cache_is_never_in_memory_twice() -> None:
    layers = [FullCache() for _ in range(8)]
    cache = Cache(list(layers))
    cache.reserve(4096)
    rows = mx.zeros((1, 4, 8, 128))
    for layer in layers:
        layer.write(rows, rows, Span(0, 8))
    cache.commit(8)
    mx.eval(cache.arrays())
    before = cache.nbytes
    mx.reset_peak_memory()
    start = mx.get_active_memory()
    cache.reserve(4097)
    mx.eval(cache.arrays())
    grown = cache.nbytes - before
    assert mx.get_peak_memory() - start < grown + before / 4
