"""Text that comes in pieces, read from the left. Every character is copied a bounded number of times."""

import re


class Cursor:
    """The unread text, and what was read since `restart`."""

    def __init__(self, before: str):
        self._read = [before]
        self._text = ""
        self._begun = 0
        self._at = 0

    def add(self, text: str) -> None:
        self._read.append(self._text[self._begun : self._at])
        self._text = self._text[self._at :] + text
        self._begun = self._at = 0

    def match(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        """The pattern's match at the first unread character, which stays unread."""
        return pattern.match(self._text, self._at)

    def take(self, pattern: re.Pattern[str]) -> str:
        """Reads what a pattern that always matches covers."""
        found = pattern.match(self._text, self._at)
        assert found is not None, "the pattern matches the empty text too"
        self._at = found.end()
        return found[0]

    def skip(self, count: int) -> None:
        """Reads so many characters."""
        self._at += count

    @property
    def next(self) -> str:
        """The first unread character, or nothing."""
        return self._text[self._at : self._at + 1]

    @property
    def left(self) -> int:
        """How many characters are unread."""
        return len(self._text) - self._at

    @property
    def rest(self) -> str:
        """What is unread."""
        return self._text[self._at :]

    @property
    def read(self) -> str:
        """What was read since `restart`."""
        return "".join(self._read) + self._text[self._begun : self._at]

    def restart(self) -> None:
        self._read.clear()
        self._begun = self._at
