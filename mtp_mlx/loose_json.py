"""Models' JSON -> JSON: bare keys and words, three kinds of quotes, Python's words, commas too many or too few.

Reads as the text comes and never looks back, so long strings stream and hostile nesting costs linear time.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from mtp_mlx.cursor import Cursor
from mtp_mlx.marks import MARKS, Mark
from mtp_mlx.schemas import Schema, quoted, scalar

# Deeper JSON breaks the clients' own recursive parsers.
_DEEPEST = 100
# A word without quotes that is longer was not meant as one.
_LONGEST = 4096

_SPACE = re.compile(r"\s*")
_SPACE_OR_COMMA = re.compile(r"[\s,]*")
_BARE = re.compile(rf"[^,{{}}\[\]{MARKS}]*")
_BARE_KEY = re.compile(rf"[^:,{{}}\[\]{MARKS}]*")
_BEFORE = {end: re.compile(rf"[^{end}\\]*") for end in "\"'"} | {Mark.QUOTE.value: re.compile(rf"[^{Mark.QUOTE}]*")}
_ESCAPE = re.compile(r"\\(?:[\"\\/bfnrt]|u[0-9a-fA-F]{4})")
_ESCAPED_APOSTROPHE = re.compile(r"\\'")
_ESCAPE_BEGUN = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?\Z")
# An apostrophe ends a string only where something may follow the string.
_APOSTROPHE_ENDS = re.compile(r"'\s{0,8}[,:}\]]")
_APOSTROPHE_MAY_END = re.compile(r"'\s{0,8}\Z")


@dataclass
class _Frame:
    """An object or array that is open."""

    closing: str
    schema: Schema
    empty: bool = True


class LooseJSON:
    """Reads one value from a cursor. `done` once it is complete; `failed` at the first character that fits nowhere."""

    def __init__(self, cursor: Cursor, schema: Schema, spell: Callable[[str], str]):
        self.done = False
        self.failed = False
        self._cursor = cursor
        self._schema = schema
        self._spell = spell
        self._frames: list[_Frame] = []
        self._out: list[str] = []
        self._key: list[str] | None = None  # the parts of a key that is being read
        self._end = ""  # what ends the string that is being read
        self._step: Callable[[], bool] = self._value

    def read(self) -> str:
        """As much JSON as the text so far gives."""
        while not self.done and not self.failed and self._step():
            pass
        out, self._out = "".join(self._out), []
        return out

    def _value(self) -> bool:
        self._cursor.take(_SPACE)
        first = self._cursor.next
        if not first:
            return False
        if first in "{[":
            return self._open(first)
        if first in _BEFORE:
            return self._open_string(first)
        self._step = self._word
        return True

    def _open(self, bracket: str) -> bool:
        if len(self._frames) == _DEEPEST:
            return self._fail()
        self._cursor.skip(1)
        self._out.append(bracket)
        self._frames.append(_Frame("}" if bracket == "{" else "]", self._schema))
        self._step = self._key_or_end if bracket == "{" else self._item_or_end
        return True

    def _word(self) -> bool:
        found = self._cursor.match(_BARE)
        assert found is not None
        word = found[0].strip()
        if len(found[0]) == self._cursor.left and len(word) <= _LONGEST:
            return False
        if not word or len(word) > _LONGEST:
            return self._fail()
        self._cursor.skip(len(found[0]))
        self._out.append(_bare(self._spell(word), self._schema.types))
        return self._after()

    def _key_or_end(self) -> bool:
        self._cursor.take(_SPACE_OR_COMMA)
        first = self._cursor.next
        if not first:
            return False
        if first == "}":
            return self._close()
        if first in _BEFORE:
            self._separate()
            self._key = []
            return self._open_string(first)
        return self._bare_key()

    def _bare_key(self) -> bool:
        found = self._cursor.match(_BARE_KEY)
        assert found is not None
        if len(found[0]) > _LONGEST:
            return self._fail()
        if len(found[0]) == self._cursor.left:
            return False
        self._cursor.skip(len(found[0]))
        if self._cursor.next != ":" or not found[0].strip():
            return self._fail()
        self._separate()
        self._out.append(quoted(found[0].strip()))
        return self._end_key(found[0].strip())

    def _end_key(self, key: str) -> bool:
        self._key = None
        self._schema = self._frames[-1].schema.member(key)
        self._step = self._colon
        return True

    def _colon(self) -> bool:
        self._cursor.take(_SPACE)
        if self._cursor.next not in ("", ":"):
            return self._fail()
        if not self._cursor.next:
            return False
        self._cursor.skip(1)
        self._out.append(":")
        self._step = self._value
        return True

    def _item_or_end(self) -> bool:
        self._cursor.take(_SPACE_OR_COMMA)
        if not self._cursor.next:
            return False
        if self._cursor.next == "]":
            return self._close()
        self._separate()
        self._schema = self._frames[-1].schema.item
        self._step = self._value
        return True

    def _separate(self) -> None:
        if not self._frames[-1].empty:
            self._out.append(",")
        self._frames[-1].empty = False

    def _close(self) -> bool:
        self._cursor.skip(1)
        self._out.append(self._frames.pop().closing)
        return self._after()

    def _after(self) -> bool:
        self.done = not self._frames
        if self._frames:
            self._step = self._key_or_end if self._frames[-1].closing == "}" else self._item_or_end
        return True

    def _open_string(self, end: str) -> bool:
        self._cursor.skip(1)
        self._end = end
        self._out.append('"')
        self._step = self._string
        return True

    def _string(self) -> bool:
        self._emit(quoted(self._spell(self._cursor.take(_BEFORE[self._end])))[1:-1])
        if not self._cursor.next:
            return False
        if self._cursor.next == "\\":
            return self._escape()
        if self._end == "'" and not self._cursor.match(_APOSTROPHE_ENDS):
            return self._apostrophe()
        return self._close_string()

    def _escape(self) -> bool:
        if self._cursor.match(_ESCAPE_BEGUN):
            return False
        if self._end == "'" and self._cursor.match(_ESCAPED_APOSTROPHE):
            return self._replace(2, "'")
        found = self._cursor.match(_ESCAPE)
        # What is no escape of JSON's is a backslash.
        return self._replace(len(found[0]), found[0]) if found else self._replace(1, "\\\\")

    def _apostrophe(self) -> bool:
        if self._cursor.match(_APOSTROPHE_MAY_END):
            return False
        return self._replace(1, "'")

    def _replace(self, count: int, escaped: str) -> bool:
        self._cursor.skip(count)
        self._emit(escaped)
        return True

    def _close_string(self) -> bool:
        self._cursor.skip(1)
        self._out.append('"')
        if self._key is None:
            return self._after()
        return self._end_key(json.loads(f'"{"".join(self._key)}"'))

    def _emit(self, escaped: str) -> None:
        self._out.append(escaped)
        if self._key is not None:
            self._key.append(escaped)

    def _fail(self) -> bool:
        self.failed = True
        return False


def _bare(word: str, types: frozenset[str]) -> str:
    """A word without quotes. Text is written in quotes, so a null is one even where the schema wants text."""
    return scalar(word, types) or scalar(word, frozenset({"null"})) or quoted(word)


def read_whole(text: str, schema: Schema) -> str | None:
    """A text that is one object or array, as JSON; None if it is not."""
    if not text.lstrip().startswith(("{", "[")):
        return None
    cursor = Cursor("")
    cursor.add(text)
    reader = LooseJSON(cursor, schema, str)
    found = reader.read()
    return found if reader.done and not cursor.rest.strip() else None
