"""A stop text is found however the text is cut into pieces, and nothing else is lost or held back."""

from itertools import product

import pytest

from mtp_mlx.stops import StopText

TEXT = "one two three two one<end>more"


def _through(pieces: list[str], stops: tuple[str, ...]) -> tuple[str, str | None]:
    watch, out = StopText(stops), ""
    for piece in pieces:
        text, stopped = watch.feed(piece)
        out += text
        if stopped:
            return out, stopped
    return out + watch.finish(), None


@pytest.mark.parametrize("stops", [("<end>",), ("two o", "<end>"), ("three", "thr"), ("e<", "nothing"), ("o", ""), ()])
def test_however_a_text_is_cut_it_ends_at_the_first_stop(stops: tuple[str, ...]) -> None:
    there = [stop for stop in stops if stop and stop in TEXT]
    begin = min(map(TEXT.index, there), default=len(TEXT))
    # Of two that begin at the same place the shorter one may be complete before the other.
    expected: list[tuple[str, str | None]] = [(TEXT[:begin], stop) for stop in there if TEXT.index(stop) == begin]
    expected = expected or [(TEXT, None)]
    for size in range(1, len(TEXT) + 1):
        assert _through([TEXT[i : i + size] for i in range(0, len(TEXT), size)], stops) in expected
    for cut, other in product(range(len(TEXT)), repeat=2):
        low, high = sorted((cut, other))
        assert _through([TEXT[:low], TEXT[low:high], TEXT[high:]], stops) in expected


def test_no_more_is_held_back_than_may_begin_a_stop() -> None:
    watch = StopText(("<end>",))
    assert watch.feed("a < b") == ("a < b", None)
    assert watch.feed("a <") == ("a ", None)
    assert watch.feed("en") == ("", None)
    assert watch.feed("joy") == ("<enjoy", None)
    assert watch.feed("<<end") == ("<", None) and watch.finish() == "<end"
