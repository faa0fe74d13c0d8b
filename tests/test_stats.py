"""The figures add up."""

import mlx.core as mx
import pytest

from mtp_mlx.batch import Round
from mtp_mlx.clock import Times
from mtp_mlx.depth import Fixed
from mtp_mlx.stats import Memory, Stats

ROW = mx.zeros((1, 1))


def _round(tokens: int, drafted: int, times: Times, copied: bool = False) -> Round:
    return Round(list(range(tokens)), drafted, copied, tokens - 1, True, ROW, times)


def test_figures_of_three_rounds() -> None:
    stats = Stats(10, ttft_seconds=0.5, memory=Memory(target=7))
    whole, split = Times(0.1, 0.02, None, None, None), Times(0.21, 0.04, 0.01, 0.06, 0.10)
    for result in (_round(4, 3, whole), _round(1, 3, split), _round(2, 1, whole)):
        stats = stats.after(result, Fixed(3), cache_bytes=11, peak_bytes=13)
    figures = stats.figures()
    assert figures["generation_tokens"] == 7 and figures["rounds"] == 3
    assert figures["tokens_per_round"] == pytest.approx(7 / 3)
    assert figures["generation_tps"] == pytest.approx(7 / 0.41)
    assert figures["prompt_tps"] == pytest.approx(20)
    assert (figures["drafted"], figures["accepted"]) == (7, 4)
    assert figures["accepted_per_position"] == pytest.approx([2 / 3, 1 / 2, 1 / 2])
    assert figures["commit_ms"] == pytest.approx(10)
    assert figures["draft_ms"] == pytest.approx(60)
    assert figures["verify_ms"] == pytest.approx(100)
    assert figures["host_ms"] == pytest.approx(40), "of the split rounds only, so that the three phases add up"
    assert figures["depth"] == 3 and figures["depth_reason"] == "set by the caller"
    assert figures["memory"] == {"target": 7, "drafter": 0, "cache": 11, "peak": 13}


def test_copies_are_counted_apart_from_the_drafters_own() -> None:
    whole = Times(0.1, 0.02, None, None, None)
    stats = Stats(10)
    for result in (_round(4, 3, whole), _round(9, 15, whole, copied=True), _round(1, 3, whole)):
        stats = stats.after(result, Fixed(3), cache_bytes=0, peak_bytes=0)
    figures = stats.figures()
    assert (figures["drafted"], figures["accepted"]) == (21, 11)
    assert (figures["copied"], figures["copied_accepted"]) == (15, 8)
    assert figures["accepted_per_position"] == pytest.approx([1 / 2, 1 / 2, 1 / 2])


def test_a_stop_inside_an_accepted_run_cuts_the_round() -> None:
    result = Round([5, 6, 7, 8], 3, False, 3, True, ROW, Times(0.1, 0.1, None, None, None))
    assert result.first(2).tokens == [5, 6] and result.first(2).accepted == 2
    assert result.first(4) == result
    corrected = Round([5, 6], 3, False, 1, True, ROW, Times(0.1, 0.1, None, None, None))
    assert corrected.first(1).accepted == 1


def test_nothing_measured_is_none_and_not_zero() -> None:
    figures = Stats(1).figures()
    assert figures["draft_ms"] is None and figures["verify_ms"] is None and figures["host_ms"] is None


def test_a_peak_is_not_forgotten_where_another_text_begins() -> None:
    stats, whole = Stats(10), Times(0.1, 0.02, None, None, None)
    for peak in (5, 13, 7):
        stats = stats.after(_round(1, 0, whole), Fixed(0), cache_bytes=0, peak_bytes=peak)
    assert stats.memory.peak == 13
