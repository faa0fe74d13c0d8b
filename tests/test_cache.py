"""The buffers hand out exactly the rows that plain attention over the whole history would see."""

import mlx.core as mx
import numpy as np
import pytest
from conftest import gap, rows_of

from mtp_mlx.cache import (
    MAX_BLOCK,
    Cache,
    FullCache,
    KeyValueCache,
    QuantisedCache,
    RecurrentCache,
    SlidingCache,
    bucket,
    full_cache,
    kv_group,
)
from mtp_mlx.types import Mask, PackedRows, Span, Visible

WINDOW = 8


def _rows(start: int, length: int) -> mx.array:
    """Rows that carry their own position, (1, 1, L, 1)."""
    return mx.arange(start, start + length).astype(mx.float32).reshape(1, 1, length, 1)


def _seen(visible: Visible, mask: Mask, length: int) -> list[list[int]]:
    """For every query of a block, the positions it can see, sorted."""
    held = np.array(rows_of(visible).keys)[0, 0, :, 0].astype(int)
    if isinstance(mask, mx.array):
        allowed = np.broadcast_to(np.array(mask), (1, 1, length, len(held)))[0, 0]
    else:
        assert mask == "causal"
        allowed = np.tril(np.ones((length, len(held)), bool), len(held) - length)
    return [sorted(held[row].tolist()) for row in allowed]


def _expected(start: int, length: int, window: int) -> list[list[int]]:
    return [list(range(max(0, q - window + 1), q + 1)) for q in range(start, start + length)]


def _layer(kind: str) -> tuple[KeyValueCache, int]:
    return (FullCache(), 10_000) if kind == "full" else (SlidingCache(WINDOW), WINDOW)


@pytest.mark.parametrize("kind", ["full", "sliding"])
@pytest.mark.parametrize("prompt", [1, 5, WINDOW, WINDOW + 1, 3 * WINDOW, 100])
@pytest.mark.parametrize("chunk", [1, 3, WINDOW, 64])
def test_a_block_sees_its_past_and_nothing_else(kind: str, prompt: int, chunk: int) -> None:
    layer, window = _layer(kind)
    cache = Cache([layer])
    cache.reserve(prompt + 200)
    for start in range(0, prompt, chunk):
        length = min(chunk, prompt - start)
        span = Span(start, length)
        mask = layer.mask(span)
        visible = layer.write(_rows(start, length), _rows(start, length), span)
        assert _seen(visible, mask, length) == _expected(start, length, window)
        cache.commit(length)

    position = prompt
    rng = np.random.default_rng(prompt)
    for _ in range(30):  # rounds that keep anything from one row to all of them
        length = int(rng.integers(1, 9))
        span = cache.span(length)
        mask = layer.mask(span)
        visible = layer.write(_rows(position, length), _rows(position, length), span)
        assert _seen(visible, mask, length) == _expected(position, length, window)
        kept = int(rng.integers(1, length + 1))
        cache.commit(mx.array([kept]))
        position += kept
        # What a drafter that shares the cache may see: everything committed, or the last window of it.
        newest = Span(cache.position - 1, 1)
        assert _seen(layer.stored(), layer.mask(newest), 1) == _expected(position - 1, 1, window)


def test_rejected_rows_of_the_largest_block_stay_out_of_the_window() -> None:
    layer, _ = _layer("sliding")
    cache = Cache([layer])
    position = 0
    for kept in (1, MAX_BLOCK, 1, 1, 2, MAX_BLOCK - 1, 1):
        span = cache.span(MAX_BLOCK)
        mask = layer.mask(span)
        visible = layer.write(_rows(position, MAX_BLOCK), _rows(position, MAX_BLOCK), span)
        assert _seen(visible, mask, MAX_BLOCK) == _expected(position, MAX_BLOCK, WINDOW)
        cache.commit(kept)
        position += kept


def test_rows_of_a_batch_stand_at_their_own_positions() -> None:
    layer = SlidingCache(WINDOW)
    cache = Cache([layer], batch=2)
    cache.commit(mx.array([3, 20]))
    span = cache.span(2)
    rows = mx.concatenate([_rows(3, 2), _rows(20, 2)], axis=0)
    visible = layer.write(rows, rows, span)
    ages = np.array(layer.mask(span))
    slots = np.array(rows_of(visible).keys)[:, 0, :, 0].astype(int)
    assert slots[0, 3:5].tolist() == [3, 4] and slots[1, 20:22].tolist() == [20, 21]
    assert ages.shape == (2, 1, 2, layer.size)
    assert ages[0, 0, 1, :5].all() and not ages[0, 0, 1, 5:].any()


def test_growing_keeps_what_is_stored() -> None:
    layer = FullCache()
    cache = Cache([layer])
    cache.reserve(10)
    layer.write(_rows(0, 10), _rows(0, 10), Span(0, 10))
    cache.commit(10)
    cache.reserve(1000)
    span = cache.span(1)
    visible = layer.write(_rows(10, 1), _rows(10, 1), span)
    assert rows_of(visible).keys.shape[2] == cache.capacity == 1024
    assert _seen(visible, layer.mask(span), 1) == _expected(10, 1, 10_000)


def test_reading_a_prompt_never_attends_over_empty_slots() -> None:
    layer = FullCache()
    Cache([layer]).reserve(100_000)
    assert rows_of(layer.write(_rows(0, 7), _rows(0, 7), Span(0, 7))).keys.shape[2] == 7


@pytest.mark.parametrize("rows", [1, 256, 257, 3000, 70_001, 262_144])
def test_a_bucket_holds_its_rows_and_wastes_little(rows: int) -> None:
    assert rows <= bucket(rows) <= rows + max(255, rows // 8)


def test_a_write_in_decoding_happens_in_place() -> None:
    """A copy of a long buffer in every round would cost more than the round itself."""
    layer = FullCache()
    cache = Cache([layer])
    cache.reserve(200_000)
    row = mx.ones((1, 1, 1, 64))
    for round_number in range(3):
        layer.write(row, row, cache.span(1))
        cache.commit(1)
        if round_number == 1:
            mx.eval(cache.arrays())
            before = mx.get_active_memory()
            mx.reset_peak_memory()
    mx.eval(cache.arrays())
    assert mx.get_peak_memory() - before < cache.nbytes / 4


HEADS, SIZE, CHANNELS, KERNEL = (2, 4), (32, 48), 12, 4  # of a recurrent layer: (key, value) heads and their sizes


def _put(cache: RecurrentCache, rows: list[mx.array]) -> mx.array:
    """Let a block go through a recurrent layer: its convolution's input, then what the state reads."""
    mixed, *inputs = rows
    return mx.concatenate([cache.extend(mixed).reshape(1, -1), cache.recur(*inputs).reshape(1, -1)], axis=1)


def _block_of(length: int, seed: int, dtype: mx.Dtype = mx.float32, batch: int = 1) -> list[mx.array]:
    """Rows of the convolution, queries, keys, values, decay and beta."""
    keys = mx.random.split(mx.random.key(seed), 6)
    shapes = [(CHANNELS,), (HEADS[0], SIZE[0]), (HEADS[0], SIZE[0]), (HEADS[1], SIZE[1])]
    rows = [mx.random.normal((batch, length, *shape), key=key) for shape, key in zip(shapes, keys[:4], strict=True)]
    rows[2] = rows[2] / mx.linalg.norm(rows[2], axis=-1, keepdims=True)
    decay = mx.random.uniform(0.9, 1.0, (batch, length, HEADS[1]), key=keys[4])
    beta = mx.random.uniform(0.0, 1.0, (batch, length, HEADS[1]), key=keys[5])
    return [array.astype(dtype) for array in rows] + [decay, beta.astype(dtype)]


def _first(rows: list[mx.array], count: int) -> list[mx.array]:
    return [array[:, :count] for array in rows]


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("kept", range(1, 8))
def test_a_recurrent_layer_that_keeps_a_part_is_one_that_never_saw_the_rest(kept: int, dtype: mx.Dtype) -> None:
    """To the bit, whether the host or only the device knows the number."""
    before, block, after = (_block_of(length, seed, dtype) for seed, length in enumerate((5, 7, 3)))
    results = []
    for commit in (None, kept, mx.array([kept])):
        cache = RecurrentCache(KERNEL)
        _put(cache, before)
        cache.commit(5)
        seen = _put(cache, _first(block, kept) if commit is None else block)
        cache.commit(kept if commit is None else commit)
        results.append([*cache.arrays(), _put(cache, after)])
    for other in results[1:]:
        assert all(mx.array_equal(a, b).item() for a, b in zip(results[0], other, strict=True))
    assert results[0][1].dtype == mx.float32
    assert mx.isfinite(seen).all()


def test_a_recurrent_layer_computes_nothing_again_where_all_rows_are_kept() -> None:
    cache = RecurrentCache(KERNEL)
    _put(cache, _block_of(6, 0))
    after = cache.arrays()[-1]
    cache.commit(6)
    assert cache.arrays()[1] is after


def test_rows_of_a_batch_keep_their_own_part_of_a_recurrent_block() -> None:
    batch, blocks = RecurrentCache(KERNEL), _block_of(5, 3, batch=3)
    _put(batch, blocks)
    batch.commit(mx.array([1, 5, 3]))
    for row, kept in enumerate((1, 5, 3)):
        single = RecurrentCache(KERNEL)
        _put(single, [array[row : row + 1, :kept] for array in blocks])
        single.commit(kept)
        for mine, theirs in zip(batch.arrays(), single.arrays(), strict=True):
            assert mx.array_equal(mine[row], theirs[0])


def test_a_recurrent_block_that_is_abandoned_leaves_no_trace() -> None:
    """A round that fails before its commit: the next block starts from the same state."""
    cache, block = RecurrentCache(KERNEL), _block_of(4, 1)
    _put(cache, _block_of(5, 0))
    cache.commit(5)
    expected = _put(cache, block)
    _put(cache, _block_of(8, 2))
    assert mx.array_equal(_put(cache, block), expected)


@pytest.mark.parametrize("length", [1, 4, 8])
def test_a_recurrent_block_holds_its_inputs_and_not_a_state_for_every_row(length: int) -> None:
    cache = Cache([RecurrentCache(KERNEL)])
    _put(cache.recurrent(0), _block_of(5, 0, mx.bfloat16))
    cache.commit(5)
    state = HEADS[1] * SIZE[1] * SIZE[0] * 4
    tail = (KERNEL - 1) * CHANNELS * 2
    assert cache.nbytes == cache.position.nbytes + state + tail
    _put(cache.recurrent(0), _block_of(length, 1, mx.bfloat16))
    row = 2 * (CHANNELS + HEADS[0] * SIZE[0] + HEADS[1] * SIZE[1] + HEADS[1]) + 4 * HEADS[1]  # decay is float32
    assert cache.nbytes == cache.position.nbytes + 2 * (state + tail) + length * row
    cache.commit(1)
    assert cache.nbytes == cache.position.nbytes + state + tail


def test_the_decay_is_not_rounded_to_the_rows_precision() -> None:
    """In bfloat16 0.999 is 1: a memory that should have lost 63 % after 1000 rows would have lost nothing."""
    cache, rows = RecurrentCache(KERNEL), _block_of(1, 0, mx.bfloat16)
    _put(cache, rows)
    cache.commit(1)
    start = cache.arrays()[1]
    still = [*rows[:4], mx.full(rows[4].shape, 0.999), mx.zeros_like(rows[5])]
    for _ in range(1000):
        _put(cache, still)
        cache.commit(1)
        mx.eval(cache.arrays())
    assert mx.allclose(cache.arrays()[1], start * 0.999**1000, rtol=1e-4)


def test_the_layer_of_a_drafter_lives_in_the_targets_cache() -> None:
    cache, own = Cache([FullCache()]), FullCache()
    cache.reserve(300)
    cache.attach(own)
    own.write(_rows(0, 300), _rows(0, 300), Span(0, 300))
    assert rows_of(own.stored()).keys.shape[2] == cache.capacity
    assert cache.nbytes > rows_of(own.stored()).keys.nbytes
    cache.reserve(5000)
    assert rows_of(own.stored()).keys.shape[2] == cache.capacity


def test_a_lost_row_that_is_not_finite_does_not_reach_the_state() -> None:
    for poisoned in range(2, 6):  # keys, values, decay, beta
        cache, block = RecurrentCache(KERNEL), _block_of(4, 1)
        broken = [mx.where((mx.arange(4) == 3).reshape(1, 4, *[1] * (a.ndim - 2)), mx.nan, a) for a in block[2:]]
        _put(cache, [*block[:poisoned], broken[poisoned - 2], *block[poisoned + 1 :]])
        cache.commit(mx.array([2]))
        clean = RecurrentCache(KERNEL)
        _put(clean, _first(block, 2))
        clean.commit(2)
        assert mx.array_equal(cache.arrays()[1], clean.arrays()[1])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [32, 64, 96])
def test_quantised_rows_are_attended_to_as_if_they_were_unpacked(bits: int, size: int) -> None:
    layer = QuantisedCache(bits, kv_group(size))
    cache = Cache([layer])
    cache.reserve(40)
    random = np.random.default_rng(size)

    def draw(heads: int, length: int) -> mx.array:
        return mx.array(random.normal(size=(1, heads, length, size)), mx.float32)

    keys, values = draw(2, 20), draw(2, 20)
    of_prompt = rows_of(layer.write(keys, values, Span(0, 20)))  # what a prompt sees has been through the cache as well
    assert 0 < gap(of_prompt.keys, keys) < (0.5 if bits == 4 else 0.03)
    cache.commit(20)
    for length in (1, 5):
        span = cache.span(length)
        visible, mask = layer.write(draw(2, length), draw(2, length), span), layer.mask(span)
        assert isinstance(visible, PackedRows) and isinstance(mask, mx.array)
        queries = draw(6, length)  # three heads to each of the two
        found = visible.attend(queries, 0.3, mask)
        assert gap(found, visible.unpacked().attend(queries, 0.3, mask)) < 1e-5
        assert gap(visible.unpacked().keys[:, :, :20], of_prompt.keys) == 0
        cache.commit(length)
    plain = FullCache()
    plain.reserve(cache.capacity)
    plain.write(keys, values, Span(0, 20))
    stored, whole = (sum(array.nbytes for array in held.arrays()) for held in (layer, plain))
    assert stored / whole == pytest.approx((bits + 2 * 32 / kv_group(size)) / 32)


def test_a_head_that_no_group_fits_is_refused() -> None:
    with pytest.raises(ValueError, match="a head of 80 values cannot be quantised, only multiples of 32"):
        full_cache(80, 8)
    assert type(full_cache(80, None)) is FullCache
