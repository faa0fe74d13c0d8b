"""Sampling draws from mlx-lm's distribution, with a key for every absolute position."""

import itertools
import math
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest
from conftest import needs_compiler
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p, apply_xtc

from mtp_mlx import sampling
from mtp_mlx.accept import normalise
from mtp_mlx.errors import RequestError
from mtp_mlx.sampling import (
    DRAFT,
    RESIDUAL,
    STREAMS,
    TEST,
    XTC,
    Greedy,
    Sample,
    Sampler,
    check_seed,
    choose_sampler,
    draw,
    keys,
    stream,
    uniform,
)

V = 12
DRAWS = 100_000
FILTERS: list[dict[str, Any]] = [
    {},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"min_p": 0.6, "min_tokens_to_keep": 3},
    {"top_k": 3},
    {"xtc_probability": 1.0},
    {"xtc_probability": 1.0, "xtc_threshold": 0.05, "xtc_special_tokens": (1, 4)},
    {"top_p": 0.9, "min_p": 0.02, "xtc_probability": 1.0, "top_k": 4},
]


def _keys(seed: int, first: int, rows: int) -> mx.array:
    return keys(mx.array(seed, mx.uint32), mx.arange(first, first + rows)[None])


def _rows(rows: int, width: int = V, levels: int | None = None) -> mx.array:
    """Log-probabilities of a block (1, rows, width); with few `levels` there are many ties."""
    logits = np.random.default_rng(5).normal(size=(1, rows, width)) * 2
    return normalise(mx.array(np.round(logits * levels) / levels if levels else logits).astype(mx.float32))


def _by_mlx_lm(row: mx.array, options: dict[str, Any]) -> mx.array:
    """One row (V,) as mlx-lm's sampler filters it; XTC as it does with probability 1."""
    row = row[None]
    if "top_p" in options:
        row = apply_top_p(row, options["top_p"])
    if "min_p" in options:
        row = apply_min_p(row, options["min_p"], options.get("min_tokens_to_keep", 1))
    if "xtc_probability" in options:
        special = list(options.get("xtc_special_tokens", ()))
        row = apply_xtc(row, 1.0, options.get("xtc_threshold", 0.1), special)
    if "top_k" in options:
        row = apply_top_k(row, options["top_k"])
    return row[0]


@pytest.mark.parametrize("options", FILTERS)
@pytest.mark.parametrize("levels", [None, 1])
@pytest.mark.parametrize("width", [V, 400])
def test_law_is_mlx_lms_in_every_row(options: dict[str, Any], levels: int | None, width: int) -> None:
    rows = _rows(40, width, levels)
    ours = Sample(0.7, **options).law(rows, _keys(1, 0, 40))[0]
    for row, got in zip(rows[0], ours, strict=True):
        kept = _by_mlx_lm(row, options)
        assert (mx.isfinite(got) == mx.isfinite(kept)).all()
        assert mx.allclose(mx.exp(got), mx.softmax(kept / 0.7), atol=1e-6)


@pytest.mark.parametrize("options", FILTERS)
@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_draws_follow_the_law(options: dict[str, Any], temperature: float) -> None:
    """One draw at each of many positions, all from the same distribution."""
    rows = mx.broadcast_to(_rows(1), (1, DRAWS, V))
    drawn = np.array(Sample(temperature, **options)(rows, _keys(1, 0, DRAWS))[0])
    counts = np.bincount(drawn, minlength=V)
    kept = np.array(_by_mlx_lm(_rows(1)[0, 0], options), np.float64)
    weights = np.exp(kept / temperature)
    expected = DRAWS * weights / weights.sum()
    assert (counts[expected == 0] == 0).all()
    likely = expected > 5
    chi_square = ((counts[likely] - expected[likely]) ** 2 / expected[likely]).sum()
    # Mean = degrees of freedom, standard deviation = sqrt(2 dof); the seed is fixed, so this cannot flicker.
    dof = max(likely.sum() - 1, 1)
    assert chi_square < dof + 5 * np.sqrt(2 * dof)


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_xtc_flips_one_coin_for_every_position(probability: float) -> None:
    """The coin leaves a row as it is or filters it as a whole, independently of the row beside it."""
    rows = mx.broadcast_to(_rows(1), (1, DRAWS, V))
    ours = Sample(1.0, xtc_probability=probability).law(rows, _keys(9, 0, DRAWS))[0]
    acted = np.array(mx.isinf(ours).any(axis=-1), np.float64)
    noise = 5 * np.sqrt(probability * (1 - probability) / DRAWS)
    assert abs(acted.mean() - probability) <= noise
    assert abs(np.cov(acted[1:], acted[:-1])[0, 1]) <= noise
    filtered = mx.isfinite(_by_mlx_lm(_rows(1)[0, 0], {"xtc_probability": 1.0}))
    assert (mx.isfinite(ours) == (filtered | mx.array(acted == 0)[:, None])).all()


def test_temperature_zero_is_greedy_and_its_law_has_one_token() -> None:
    rows = _rows(5)
    assert choose_sampler(0.0, 1.0, 0.0, 0) == Greedy()
    best = mx.argmax(rows, axis=-1)
    assert (Greedy()(rows, _keys(1, 0, 5)) == best).all()
    assert (mx.exp(Greedy().law(rows, _keys(1, 0, 5))) == (mx.arange(V) == best[..., None])).all()


def test_a_temperature_near_zero_is_greedy_and_not_noise() -> None:
    rows = normalise(0.01 * _rows(1, 4000))  # nearly flat: log-probabilities of about -8
    for temperature in (1e-8, 1e-30, 1e-40):
        assert Sample(temperature)(rows, _keys(1, 3, 1)).item() == mx.argmax(rows).item()


def test_a_top_k_of_the_whole_vocabulary_is_off() -> None:
    rows, key = _rows(3), _keys(1, 0, 3)
    for top_k in (V, V + 1, 10**6):
        assert (Sample(1.0, top_k=top_k).law(rows, key) == Sample(1.0).law(rows, key)).all()


def test_top_p_of_zero_and_one_is_off_as_in_mlx_lm() -> None:
    rows, key = _rows(3), _keys(1, 0, 3)
    assert mx.isfinite(Sample(1.0, top_p=0.0).law(rows, key)).all()
    assert mx.isfinite(Sample(1.0, top_p=1.0).law(rows, key)).all()


@pytest.mark.parametrize("options", FILTERS)
def test_a_draw_depends_on_logits_seed_and_position_only(options: dict[str, Any]) -> None:
    sampler = Sample(1.0, **(options | ({"xtc_probability": 0.5} if "xtc_probability" in options else {})))
    rows = _rows(9, 301)
    whole = sampler(rows, _keys(7, 100, 9))[0].tolist()
    alone = [sampler(rows[:, i : i + 1], _keys(7, 100 + i, 1)).item() for i in range(9)]
    assert whole == alone
    beside = sampler(mx.repeat(rows, 3, axis=0), mx.repeat(_keys(7, 100, 9), 3, axis=0))
    assert beside.tolist() == [whole] * 3
    assert sampler(rows, _keys(8, 100, 9))[0].tolist() != whole
    assert sampler(rows, _keys(7, 101, 9))[0].tolist() != whole


@needs_compiler
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("options", [FILTERS[0], FILTERS[3], FILTERS[6], FILTERS[7]])
@pytest.mark.parametrize("width", [2, 1031])
def test_compiled_equals_uncompiled(options: dict[str, Any], width: int) -> None:
    sampler, rows, seed = Sample(0.8, **options), _rows(60, width), mx.array(3, mx.uint32)

    def step(rows: mx.array, seed: mx.array, position: mx.array) -> tuple[mx.array, mx.array]:
        key = keys(seed, position + mx.arange(60)[None])
        return sampler(rows, key), sampler.law(rows, stream(key, DRAFT))

    tokens, law = step(rows, seed, mx.array(40))
    compiled_tokens, compiled_law = mx.compile(step)(rows, seed, mx.array(40))
    assert (tokens == compiled_tokens).all()
    assert (mx.isfinite(law) == mx.isfinite(compiled_law)).all()
    assert mx.allclose(mx.exp(law), mx.exp(compiled_law), rtol=1e-5, atol=1e-8)


@needs_compiler
@pytest.mark.usefixtures("compiled")
def test_the_random_state_of_the_process_is_left_alone() -> None:
    mx.random.seed(11)
    state = cast(list[mx.array], mx.random.state)
    before = [word.tolist() for word in state]
    sampler = Sample(0.8, top_p=0.9, min_p=0.01, xtc_probability=0.5, top_k=5)
    mx.eval(sampler(_rows(3), _keys(1, 0, 3)), mx.compile(sampler)(_rows(3), _keys(1, 0, 3)))
    assert [word.tolist() for word in state] == before


@pytest.mark.parametrize("number", [0.0, 2.0**-32, 0.5, 1 - 2.0**-24])
def test_no_random_number_makes_a_filtered_token_win(number: float, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = mx.where(mx.arange(V) == 5, number, mx.array([[[0.0], [1 - 2.0**-24]]]))  # (1, 2, V)
    monkeypatch.setattr(sampling, "uniform", lambda keys, size: numbers)
    only = mx.where(mx.arange(V) == 5, -80.0, -math.inf)
    assert draw(mx.broadcast_to(only, (1, 2, V)), _keys(2, 0, 2)).tolist() == [[5, 5]]


def test_keys_are_made_from_seed_and_position() -> None:
    positions = mx.array([[3, 4], [7, 8]])
    assert keys(mx.array(9, mx.uint32), positions).tolist() == [[[9, 3], [9, 4]], [[9, 7], [9, 8]]]
    each = keys(mx.array([2**32 - 1, 5], mx.uint32), positions)
    assert each.tolist() == [[[2**32 - 1, 3], [2**32 - 1, 4]], [[5, 7], [5, 8]]] and each.dtype == mx.uint32


def _grid(seeds: list[int], positions: int) -> mx.array:
    return keys(mx.array(seeds, mx.uint32), mx.broadcast_to(mx.arange(positions), (len(seeds), positions)))


def test_no_two_streams_of_near_seeds_and_positions_share_a_key() -> None:
    grid = _grid([*range(64), *range(2**32 - 64, 2**32)], 1024)  # (128, 1024, 2)
    used = [grid] + [stream(grid, purpose) for purpose in (XTC, DRAFT, TEST, RESIDUAL)]
    words = np.stack([np.array(key) for key in used]).astype(np.uint64)
    assert len(used) == 1 + STREAMS
    assert len(np.unique(words[..., 0] << np.uint64(32) | words[..., 1])) == words[..., 0].size


def test_streams_seeds_and_positions_are_independent() -> None:
    """Pairs of random numbers fill 16 x 16 cells evenly: of two streams, and of neighbouring seeds and positions."""
    seeds, positions, cells = 65, 1025, 16
    grid = _grid(list(range(seeds)), positions)
    every = [grid] + [stream(grid, purpose) for purpose in range(STREAMS)]
    numbers = [(np.array(uniform(key, 3)) * cells).astype(int) for key in every]  # (seeds, positions, 3)
    here, shifted = (
        (slice(0, -1), slice(0, -1)),
        [(slice(s, s - 1 or None), slice(p, p - 1 or None)) for s, p in itertools.product((0, 1), repeat=2)],
    )
    dof = cells**2 - 1
    for (i, a), (j, b) in itertools.product(enumerate(numbers), repeat=2):
        for number, at in itertools.product(range(3), shifted):
            if i == j and number == 0 and at == here:
                continue  # the same number
            pairs = a[here][..., 0] * cells + b[at][..., number]
            counts = np.bincount(pairs.flatten(), minlength=cells**2)
            expected = pairs.size / cells**2
            chi_square = ((counts - expected) ** 2 / expected).sum()
            assert abs(chi_square - dof) < 6 * np.sqrt(2 * dof), (i, j, number, at)


def test_a_sampler_is_a_key_of_a_table() -> None:
    table = {Sample(0.5, xtc_special_tokens=(1, 2)): 1, Greedy(): 2}
    assert table[Sample(0.5, xtc_special_tokens=(1, 2))] == 1 and table[Greedy()] == 2
    chosen: Sampler = choose_sampler(0.5, 1.0, 0.0, 0, xtc_special_tokens=[1, 2])
    assert table[chosen] == 1


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"temperature": -0.5}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": 0.0, "top_p": 7.0}, "top-p"),
        ({"top_p": -0.1}, "top-p"),
        ({"top_p": 1.5}, "top-p"),
        ({"min_p": 2.0}, "min-p"),
        ({"min_tokens_to_keep": 0}, "min-p"),
        ({"xtc_probability": 1.1}, "XTC probability"),
        ({"xtc_threshold": 0.6}, "XTC threshold"),
        ({"top_k": -1}, "top-k"),
    ],
)
def test_an_option_out_of_range_is_named(options: dict[str, Any], word: str) -> None:
    with pytest.raises(RequestError, match=word):
        choose_sampler(**({"temperature": 0.7, "top_p": 1.0, "min_p": 0.0, "top_k": 0} | options))


def test_a_seed_is_one_word() -> None:
    check_seed(0)
    check_seed(2**32 - 1)
    for seed in (-1, 2**32):
        with pytest.raises(RequestError, match="seed"):
            check_seed(seed)
