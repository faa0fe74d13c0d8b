"""A restored sequence is one that has read the text itself: its logits, its drafts, and what it does to others."""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest
from conftest import (
    PROGRAMS,
    VOCAB,
    WINDOW,
    DialledDrafter,
    Forced,
    Recorder,
    gap,
    needs_compiler,
    open_sequence,
    tiny_pair,
    varied_tokens,
)
from mlx.utils import tree_flatten
from test_programs import Reader, Toy
from test_rounds import EXACT

from mtp_mlx.cache import FullCache, SlidingCache
from mtp_mlx.choosing import Rules
from mtp_mlx.draft_model import DraftModel
from mtp_mlx.ngram import NOBODY
from mtp_mlx.sequence import Sequence
from mtp_mlx.snapshots import OVERLAP, Snapshot, restore, take
from mtp_mlx.types import Drafter, Pair, Target

PAIRS = [
    "gemma4_keqv",
    "gemma4_ple",
    "qwen3_5_tied",
    "gemma4_keqv gemma4_ple",  # with a draft model
    "qwen3_5_moe qwen3_5_tied",
    "gemma4_keqv nobody",
    "qwen3_5_tied nobody",
]
FEW = ["gemma4_keqv", "qwen3_5_tied", "gemma4_keqv gemma4_ple", "qwen3_5_moe qwen3_5_tied"]
QUANTISED = [("gemma4_keqv", 8), ("qwen3_5_tied", 8)]
each_case = pytest.mark.parametrize(("name", "bits"), [*((name, None) for name in PAIRS), *QUANTISED])
few_cases = pytest.mark.parametrize(("name", "bits"), [*((name, None) for name in FEW), *QUANTISED])
CUTS = [1, WINDOW - 1, WINDOW, WINDOW + 1, 255, 256]
TEXT = varied_tokens(500)
FORCED = Forced(mx.array(TEXT + [0] * 40))


def pair_of(name: str) -> tuple[Target, Drafter]:
    """A target, with its own drafter or with the one named behind it."""
    variant, *other = name.split()
    target, drafter = tiny_pair(variant)
    if other:
        drafter = NOBODY if other == ["nobody"] else DraftModel(tiny_pair(other[0])[0])
    return target, drafter


def _begun(name: str, length: int, bits: int | None = None, step: int = 2048) -> Sequence:
    """A sequence that has read `length` tokens of the text."""
    sequence = open_sequence(*pair_of(name), FORCED, kv_bits=bits)
    sequence.prefill(TEXT[: length + 1], step, lambda done, total: None)
    assert sequence.length == length
    return sequence


def _restored(name: str, snapshot: Snapshot, bits: int | None = None, text: list[int] = TEXT) -> Sequence:
    pair = Pair(*pair_of(name), PROGRAMS, bits)
    return restore(pair, Rules(FORCED, drafts="argmax"), snapshot, text[snapshot.length])


@dataclass
class _Said:
    """What a sequence says when it goes on."""

    rows: mx.array  # log-probabilities
    drafted: list[mx.array]  # a drafter's logits
    tokens: list[int]  # its drafts


def _goes_on(sequence: Sequence, more: list[int]) -> _Said:
    """Read `more`, say a token, see what the drafter would say, then decode with it."""
    sequence.prefill(more, 7, lambda done, total: None)
    rows = [sequence.round(0).logprobs]
    heard = Recorder()
    drafter = sequence.pair.drafter
    if drafter.limit:
        sequence.commit()
        sequence.cache.reserve(sequence.length + 5)
        drafter.draft(sequence.state, sequence.cache, mx.array(sequence.text[-1:]), 2, heard)
    here = sequence.length + 1
    for drafts in (2, [*TEXT[here : here + 2], 0]):
        result = sequence.round(min(drafts, drafter.limit) if isinstance(drafts, int) else drafts)
        rows.append(result.logprobs[: len(result.tokens)])
    return _Said(mx.concatenate(rows)[:3], heard.logits, heard.draft if heard.tokens else [])


def _assert_same(one: _Said, other: _Said, most: float = EXACT) -> None:
    assert one.tokens == other.tokens
    for mine, theirs in zip([one.rows, *one.drafted], [other.rows, *other.drafted], strict=True):
        assert gap(mine, theirs) <= most


def _numbers(snapshot: Snapshot) -> list[np.ndarray]:
    tree = [[part.rows for part in snapshot.parts], snapshot.whole, list(snapshot.state)]
    return [np.array(array) for array in dict[str, mx.array](tree_flatten(tree)).values()]


@each_case
def test_a_restored_prompt_is_one_that_was_read(name: str, bits: int | None) -> None:
    """Below, at and above the window, around the border of a buffer; to the bit if it is read in the same pieces."""
    for cut in CUTS:
        source = _begun(name, cut, bits)
        restored = _restored(name, take(source), bits)
        assert restored.ready == source.ready and restored.text == source.text
        assert restored.cache.position.item() == cut
        more = TEXT[cut + 1 : cut + 6]
        said = _goes_on(restored, more)
        _assert_same(said, _goes_on(source, more), 0.0)
        if cut in (WINDOW, 256):
            _assert_same(said, _goes_on(_begun(name, cut + 5, bits), []))


@few_cases
def test_a_text_restored_after_rounds_is_one_that_was_read(name: str, bits: int | None) -> None:
    """After copies that were right in part, after drafts, and after a stop at every token of an accepted run."""
    for length, right, stop in ((1, 0, 1), (WINDOW - 3, 3, 4), (WINDOW, 3, 2), (252, 1, 2)):
        source = _begun(name, length, bits)
        source.round(0)
        source.round(min(3, source.pair.drafter.limit))
        here = source.length + 1
        wrong = [(token + 1) % VOCAB for token in TEXT[here + right : here + 5]]
        assert source.round([*TEXT[here : here + right], *wrong]).accepted == right
        source.keep(stop)
        snapshot, more = take(source), TEXT[source.length + 1 : source.length + 5]
        assert snapshot.tokens == TEXT[: here + stop - 1]
        said = _goes_on(_restored(name, snapshot, bits), more)
        _assert_same(said, _goes_on(_begun(name, snapshot.length + len(more), bits), []))


@pytest.mark.parametrize("name", FEW)
def test_it_can_be_restored_in_the_middle_of_a_reply(name: str) -> None:
    """The drafter too goes on at once, without a round that tells it of the text."""
    for plain in (1, 20):
        source = _begun(name, WINDOW + 4)
        for _ in range(plain):  # a drafter is told of these late
            source.round(0)
        restored, drafts = _restored(name, take(source)), min(3, source.pair.drafter.limit)
        for _ in range(2):
            mine, theirs = restored.round(drafts), source.round(drafts)
            assert mine.tokens == theirs.tokens and mine.accepted == theirs.accepted
            assert gap(mine.logprobs, theirs.logprobs) == 0


@few_cases
def test_snapshots_of_one_conversation_share_its_rows(name: str, bits: int | None) -> None:
    sequence, snapshots = _begun(name, 20, bits), list[Snapshot]()
    for turn in (3, 40, 60, 2):
        snapshots.append(take(sequence, snapshots[-1] if snapshots else None))
        here = sequence.length + 1
        assert sequence.round([*TEXT[here : here + 3], 0]).accepted == 3
        snapshots.append(take(sequence, snapshots[-1]))  # a draft model has not read the newest rows
        sequence.round(0)
        here = sequence.length + 1
        sequence.prefill(TEXT[here : here + turn], 16, lambda done, total: None)
    for snapshot in snapshots[3::2]:
        length = snapshot.length
        said = _goes_on(_restored(name, snapshot, bits), TEXT[length + 1 : length + 4])
        _assert_same(said, _goes_on(_begun(name, length + 3, bits), []))
    *_, late, last = snapshots
    assert last.parts[:-1] == late.parts and len(last.parts) > 3
    assert last.parts[-1].nbytes < take(sequence).parts[0].nbytes / 3


@few_cases
def test_what_a_sequence_does_later_does_not_change_its_snapshot(name: str, bits: int | None) -> None:
    source = _begun(name, 40, bits)
    source.round(0)
    snapshot = take(source)
    before = _numbers(snapshot)
    source.prefill(TEXT[source.length + 1 : source.length + 30], 8, lambda done, total: None)
    for number in range(8):
        source.round(min(number % 4, source.pair.drafter.limit) if number % 5 else [1, 2])
    source.prefill(TEXT[source.length + 1 : 300], 64, lambda done, total: None)  # its buffers grow on the way
    source.round(0)
    for mine, theirs in zip(_numbers(snapshot), before, strict=True):
        assert np.array_equal(mine, theirs)


@pytest.mark.parametrize("name", FEW)
def test_two_that_were_restored_go_their_own_ways(name: str) -> None:
    snapshot = take(_begun(name, 50))
    before = _numbers(snapshot)
    others = varied_tokens(30, seed=9)
    texts = [TEXT, TEXT[:50] + others, TEXT[:51] + others]
    restored = [_restored(name, snapshot, text=text) for text in texts]
    for turn in range(2):  # in turns, so that one could see what another has written
        for sequence, text in zip(restored, texts, strict=True):
            sequence.prefill(text[51 + 6 * turn : 57 + 6 * turn], 4, lambda done, total: None)
    for sequence, text in zip(restored, texts, strict=True):
        cold = open_sequence(*pair_of(name), FORCED)
        cold.prefill(text[:63], 2048, lambda done, total: None)
        _assert_same(_goes_on(sequence, []), _goes_on(cold, []))
    for mine, theirs in zip(_numbers(snapshot), before, strict=True):
        assert np.array_equal(mine, theirs)


@needs_compiler
@pytest.mark.usefixtures("compiled")
def test_replayed_rounds_leave_a_snapshot_as_it_is() -> None:
    """What a trace is given it may write into, if nobody else holds it."""
    source = _begun("qwen3_5_tied", 40)
    for _ in range(2):
        source.round(0)
    snapshot = take(source)
    before, text = _numbers(snapshot), source.text
    restored = _restored("qwen3_5_tied", snapshot)
    for _ in range(4):
        assert gap(source.round(0).logprobs, restored.round(0).logprobs) == 0
    assert restored.text[: len(text)] == text
    for mine, theirs in zip(_numbers(snapshot), before, strict=True):
        assert np.array_equal(mine, theirs)


SLOTS = 8192
ROW = 4 * 128 * 4  # bytes of a key of the toy
BUFFER = SLOTS * ROW


def _toy(*layers: FullCache | SlidingCache) -> Sequence:
    sequence = Sequence(Pair(Toy(layers, SLOTS), Reader()), Rules())
    sequence.prefill(list(range(300)), 64, lambda done, total: None)
    return sequence


def test_a_snapshot_holds_what_was_read_and_no_empty_slots() -> None:
    sequence = _toy(FullCache(), SlidingCache(SLOTS), SlidingCache(100))
    sequence.round(0)
    mx.clear_cache()
    before = mx.get_active_memory()
    snapshot = take(sequence)
    assert snapshot.length == 300
    assert snapshot.nbytes == ROW * 2 * (300 + 300 + 100) + snapshot.state[0].nbytes
    assert mx.get_active_memory() - before == pytest.approx(snapshot.nbytes, rel=0.05)
    following = take(sequence, snapshot.until(300) if snapshot.cuttable else None)
    assert following.nbytes == snapshot.nbytes


@pytest.mark.parametrize("k", [0, 3])
def test_decoding_copies_no_buffer_because_of_a_snapshot(k: int) -> None:
    """Nor does taking another one: the copy of what was read is the only one."""
    sequence = _toy(FullCache(), SlidingCache(SLOTS))
    sequence.round(0)
    for _ in range(2):
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        snapshot = take(sequence)
        assert mx.get_peak_memory() - before < 1.1 * snapshot.nbytes + 2**20
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        for _ in range(6):
            sequence.round(k)
        assert mx.get_peak_memory() - before < BUFFER / 4


def test_a_restored_sequence_writes_into_its_buffers_in_place() -> None:
    source = _toy(FullCache(), SlidingCache(SLOTS))
    source.round(0)
    snapshot = take(source)
    toy = Toy((FullCache(), SlidingCache(SLOTS)), SLOTS)
    sequence = restore(Pair(toy, Reader()), Rules(), snapshot, 0)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for _ in range(6):
        sequence.round(3)
    assert mx.get_peak_memory() - before < BUFFER / 4


def test_only_what_is_nothing_but_rows_can_be_cut() -> None:
    full = Pair(Toy((FullCache(), FullCache()), 512), DialledDrafter.dial([], 0.0))
    sequence = Sequence(full, Rules())
    sequence.prefill(list(range(100)), 64, lambda done, total: None)
    snapshot = take(sequence)
    sequence.prefill(list(range(100)), 64, lambda done, total: None)
    snapshot = take(sequence, snapshot)
    assert snapshot.cuttable and len(snapshot.parts) == 2
    for end in (4, 66, 67, 68, 99, 150, snapshot.length):
        cut = snapshot.until(end)
        assert cut.tokens == snapshot.tokens[:end] and len(cut.parts) == 1 + (end > 99 - OVERLAP)
        full = Pair(Toy((FullCache(), FullCache()), 512), DialledDrafter.dial([], 0.0))
        restored = restore(full, Rules(), cut, 7)
        restored.prefill([1], 64, lambda done, total: None)
        again = take(restored, cut)
        rows = np.array(again.held().rows[0][0])[0, 0, :, 0]
        assert rows.tolist() == [*snapshot.tokens[:end], 7]
    for name in PAIRS:
        assert not take(_begun(name, 20)).cuttable
