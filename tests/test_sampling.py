"""Sampling draws from mlx-lm's distribution, with a key for every absolute position."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

from mtp_mlx.accept import normalise
from mtp_mlx.errors import RequestError
from mtp_mlx.sampling import Greedy, Sample, Sampler, choose_sampler

V = 12
DRAWS = 4_000


def _logprobs() -> mx.array:
    mx.random.seed(5)
    return normalise(2 * mx.random.normal((V,)))


def _draws(sampler: Sampler) -> np.ndarray:
    """One draw at each of many positions, all from the same distribution."""
    rows = mx.broadcast_to(_logprobs(), (1, DRAWS, V))
    drawn: np.ndarray = np.array(sampler(rows, mx.arange(DRAWS)[None])[0])
    return drawn


@pytest.mark.parametrize(("top_p", "min_p", "top_k"), [(1, 0, 0), (0.7, 0, 0), (1, 0.1, 0), (1, 0, 3), (0.8, 0, 4)])
@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_draws_follow_the_filtered_distribution(temperature: float, top_p: float, min_p: float, top_k: int) -> None:
    counts = np.bincount(_draws(Sample(temperature, top_p, min_p, top_k, seed=1)), minlength=V)
    row = _logprobs()[None]
    row = apply_top_p(row, top_p) if top_p < 1 else row
    row = apply_min_p(row, min_p) if min_p else row
    row = apply_top_k(row, top_k) if top_k else row
    expected = DRAWS * np.array(mx.softmax(row[0] / temperature))
    assert (counts[expected == 0] == 0).all()
    likely = expected > 5
    chi_square = ((counts[likely] - expected[likely]) ** 2 / expected[likely]).sum()
    # Mean = degrees of freedom, standard deviation = sqrt(2 dof); the seed is fixed, so this cannot flicker.
    dof = likely.sum() - 1
    assert chi_square < dof + 5 * np.sqrt(2 * dof)


def test_a_draw_depends_on_seed_and_position_only() -> None:
    rows = mx.broadcast_to(_logprobs(), (1, 9, V))
    whole = Sample(1.0, seed=7)(rows, mx.arange(100, 109)[None])
    alone = [Sample(1.0, seed=7)(rows[:, :1], mx.array([[p]])).item() for p in range(100, 109)]
    assert whole[0].tolist() == alone
    assert Sample(1.0, seed=8)(rows, mx.arange(100, 109)[None])[0].tolist() != alone


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ((-0.5, 1.0, 0.0, 0, 0), "temperature"),
        ((float("nan"), 1.0, 0.0, 0, 0), "temperature"),
        ((float("inf"), 1.0, 0.0, 0, 0), "temperature"),
        ((0.0, 7.0, 0.0, 0, 0), "top-p"),
        ((0.7, 0.0, 0.0, 0, 0), "top-p"),
        ((0.7, 1.5, 0.0, 0, 0), "top-p"),
        ((0.7, 1.0, 2.0, 0, 0), "min-p"),
        ((0.7, 1.0, 0.0, -1, 0), "top-k"),
        ((0.7, 1.0, 0.0, 0, -1), "seed"),
        ((0.7, 1.0, 0.0, 0, 2**32), "seed"),
    ],
)
def test_an_option_out_of_range_is_named(options: tuple[float, float, float, int, int], word: str) -> None:
    with pytest.raises(RequestError, match=word):
        choose_sampler(*options)


def test_temperature_zero_is_greedy() -> None:
    assert choose_sampler(0.0, 1.0, 0.0, 0, 0) == Greedy()


def test_a_temperature_near_zero_is_greedy_and_not_noise() -> None:
    rows = _logprobs()[None, None]
    for temperature in (1e-3, 1e-30, 1e-40):
        assert Sample(temperature)(rows, mx.array([[3]])).item() == mx.argmax(rows).item()
