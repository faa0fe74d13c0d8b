"""The estimate is the published formula over published curves, and says no where drafting would lose."""

import pytest

from mtp_mlx.errors import RequestError
from mtp_mlx.forecast import Chip, chips, estimate, this_chip

FLAT = Chip("flat", (), "", ((1, 1.0), (8, 1.0)))
DEAR = Chip("dear", (), "", ((1, 1.0), (2, 2.0)))
DENSE = (1.0,) * 9


def test_a_curve_is_a_line_between_its_entries_and_goes_on_behind_the_last() -> None:
    chip = Chip("", (), "", ((1, 1.0), (3, 1.2), (4, 1.6)))
    assert [chip.factor(rows) for rows in (1, 2, 3, 4, 6)] == pytest.approx([1.0, 1.1, 1.2, 1.6, 2.4])


def test_the_best_depth_is_that_of_the_formula() -> None:
    """engine notes 1.3: d = .066, h = .03, a flat curve, p = .7: 2.16 at depth 5."""
    found = estimate(FLAT, 0.066, DENSE, 0.7)
    assert found.depth == 5
    assert found.tokens_per_round == pytest.approx((1 - 0.7**6) / 0.3)
    assert found.speedup == pytest.approx(2.16, abs=0.01)


def test_drafting_that_would_lose_is_depth_0() -> None:
    found = estimate(DEAR, 0.1, DENSE, 0.6)
    assert (found.depth, found.tokens_per_round, found.speedup) == (0, 1.0, 1.0)
    assert estimate(FLAT, 0.066, DENSE, 0.0).depth == 0


def test_a_mixture_pays_for_the_experts_of_every_row() -> None:
    dear = tuple(1.0 + 0.4 * k for k in range(9))
    assert estimate(FLAT, 0.05, dear, 0.7).speedup < estimate(FLAT, 0.05, DENSE, 0.7).speedup
    assert estimate(FLAT, 0.05, dear, 0.7).depth < estimate(FLAT, 0.05, DENSE, 0.7).depth


@pytest.mark.parametrize("acceptance", [-0.1, 1.0, 70.0])
def test_an_acceptance_that_is_no_probability_is_refused(acceptance: float) -> None:
    with pytest.raises(RequestError, match="not a probability"):
        estimate(FLAT, 0.1, DENSE, acceptance)


def test_every_curve_starts_at_one_row_rises_and_names_its_source() -> None:
    for chip in chips():
        rows, costs = zip(*chip.cost, strict=True)
        assert (rows[0], costs[0]) == (1, 1.0) and chip.source
        assert list(rows) == sorted(rows) and list(costs) == sorted(costs)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("Apple M5 Max", "M5 Max"),
        ("Apple M3 Max", "M3 Ultra"),
        ("Apple M4 Max", "M4 Max"),
        ("Apple M4", "M4 Pro"),
        ("Apple M3 Pro", "M4 Pro"),
        ("Apple M2 Ultra", "M1 Ultra"),
    ],
)
def test_a_mac_is_likened_to_the_nearest_chip(device: str, name: str) -> None:
    chip = this_chip(device)
    assert chip is not None and chip.name == name


def test_other_machines_are_likened_to_none() -> None:
    assert this_chip("Intel(R) Xeon(R) Processor") is None
