"""Markers in a model's output: told by token id, and by text only where a tokenizer has no id for them.

From here on a marker is one character that no decoded text can hold, a lone surrogate. So the parsers read one stream
of characters, and prose that merely spells a marker cannot be mistaken for it.
"""

import re
from dataclasses import dataclass
from enum import StrEnum


class Mark(StrEnum):
    """The character that stands for a marker."""

    CALL_OPEN = "\ud801"
    CALL_CLOSE = "\ud802"
    THINK_OPEN = "\ud803"
    THINK_CLOSE = "\ud804"
    QUOTE = "\ud805"
    STOP = "\ud806"


MARKS = "".join(Mark)
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Marker:
    """A marker, its text, and its token id where the tokenizer has one."""

    mark: Mark
    text: str
    id: int | None = None


class Marking:
    """Turns tokens and their text into one stream of characters, markers included."""

    def __init__(self, markers: tuple[Marker, ...]):
        self._by_id = {marker.id: marker for marker in markers if marker.id is not None}
        self._by_text = {marker.text: marker.mark for marker in markers if marker.id is None}
        self._search = re.compile("|".join(map(re.escape, self._by_text))) if self._by_text else None
        self._spelling = {ord(marker.mark): marker.text for marker in reversed(markers)}
        self._held = ""

    def feed(self, token: int, text: str) -> str:
        """The characters that are known now. `text` may begin with what a detokenizer held back of earlier tokens."""
        text = _SURROGATE.sub("\ufffd", text)
        marker = self._by_id.get(token)
        if marker is None:
            return self._search_text(text)
        # The text of a stop token never comes, a marker's own is the end of its piece.
        return self._search_text(text.removesuffix(marker.text)) + self.flush() + marker.mark

    def flush(self) -> str:
        """What was held back because it could have become a marker."""
        held, self._held = self._held, ""
        return held

    def spell(self, text: str) -> str:
        """The text with every marker written out."""
        return text.translate(self._spelling)

    def _search_text(self, text: str) -> str:
        if self._search is None:
            return text
        text = self._search.sub(lambda found: self._by_text[found[0]], self._held + text)
        cut = len(text) - max(_overlap(text, marker) for marker in self._by_text)
        self._held = text[cut:]
        return text[:cut]


def _overlap(text: str, marker: str) -> int:
    """How many characters at the end of a text may be the beginning of a marker."""
    longest = min(len(text), len(marker) - 1)
    return next((size for size in range(longest, 0, -1) if marker.startswith(text[-size:])), 0)
