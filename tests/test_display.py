"""What a terminal is sent: colours where it shows them, and nothing that moves its cursor but what we mean to."""

import io
import os
import pty
import sys
from collections.abc import Callable

import pytest

from mtp_mlx.cli.display import Writer

GREEN = "\x1b[32m"


def shown(write: Callable[[Writer], None], monkeypatch: pytest.MonkeyPatch) -> str:
    """What a terminal gets of a writer that colours drafts."""
    leader, follower = pty.openpty()
    # As it is written: a terminal would have every line end in two characters.
    with os.fdopen(follower, "w", encoding="utf-8", newline="\n") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        writer = Writer(show_drafts=True)
        write(writer)
        writer.finish()
        monkeypatch.undo()
        text = os.read(leader, 4096).decode().replace("\r\n", "\n")
    os.close(leader)
    return text


@pytest.fixture
def colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("colours")
@pytest.mark.parametrize(("name", "value"), [(None, ""), ("NO_COLOR", "1"), ("TERM", "dumb")])
def test_drafts_are_coloured_only_where_a_terminal_shows_it(name: str | None, value: str) -> None:
    patch = pytest.MonkeyPatch()
    with patch.context() as environment, pytest.MonkeyPatch.context() as output:
        if name:
            environment.setenv(name, value)
        text = shown(lambda writer: writer.write("yes", "accepted"), output)
    assert (GREEN in text) == (name is None) and "yes" in text


@pytest.mark.usefixtures("colours")
def test_control_characters_of_a_text_do_nothing_to_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(writer: Writer) -> None:
        for piece in ("a\tb\n", "\x1b]0;title\x07", "\x1b", "[2J", "\r\x08\x7f\x00", "\x9b2J", "é 世界"):
            writer.write(piece)

    text = shown(write, monkeypatch)
    assert text == "a\tb\n␛]0;title␇␛[2J␍␈␡␀�2Jé 世界\n"


def test_where_no_terminal_listens_a_text_is_as_it_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = io.StringIO()
    monkeypatch.setattr(sys, "stdout", taken)
    writer = Writer(show_drafts=True)
    writer.write("\x1b[2J\r\x00", "accepted")
    writer.finish()
    assert taken.getvalue() == "\x1b[2J\r\x00\n"
