"""What stands between a call's markers -> name and arguments as JSON, while it comes.

Readers never raise. A call that makes no sense is handed back as the text it is (`Broken`), from its opening marker to
where the sense was lost. What is ambiguous is never guessed into a call that might be run: a call whose end is missing
counts only if the model stopped by itself after its last argument was closed.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from mtp_mlx.cursor import Cursor
from mtp_mlx.dialects import Dialect
from mtp_mlx.loose_json import LooseJSON, read_whole
from mtp_mlx.marks import MARKS, Mark
from mtp_mlx.schemas import Schema, held, quoted, scalar

Tools = Mapping[str, object]  # a tool's name -> JSON schema of its arguments


@dataclass(frozen=True)
class Named:
    """A call has begun, and this is the tool's name."""

    name: str


@dataclass(frozen=True)
class Fragment:
    """A piece of the arguments' JSON."""

    json: str


@dataclass(frozen=True)
class Done:
    """The call is complete."""


@dataclass(frozen=True)
class Closed:
    """The block of calls is over; `rest` comes after it. `marked` if its closing marker was there."""

    rest: str
    marked: bool


@dataclass(frozen=True)
class Broken:
    """What was read since the last complete call is none, and `rest` comes after it."""

    text: str
    rest: str


Part = Named | Fragment | Done | Closed | Broken


class CallReader(Protocol):
    """Reads one block of calls, from behind its opening marker. The last part it gives is `Closed` or `Broken`."""

    def feed(self, text: str) -> list[Part]: ...

    def finish(self, stopped: bool) -> list[Part]:
        """No more text comes. `stopped` if the model ended by itself, rather than being cut off."""


def call_reader(dialect: Dialect, tools: Tools, spell: Callable[[str], str]) -> CallReader:
    """The reader of a dialect's calls. `spell` writes markers out."""
    return Braces(tools, spell) if dialect.syntax == "braces" else Tags(tools, spell)


class _Reader:
    """What both readers do: steps until one needs more text, or the block is over."""

    def __init__(self, tools: Tools, spell: Callable[[str], str]):
        self._tools = tools
        self._spell = spell
        self._cursor = Cursor(Mark.CALL_OPEN.value)
        self._parts: list[Part] = []
        self._calls = 0
        self._over = False
        self._step: Callable[[], bool]

    def feed(self, text: str) -> list[Part]:
        self._cursor.add(text)
        while not self._over and self._step():
            pass
        return self._given()

    def _given(self) -> list[Part]:
        parts, self._parts = self._parts, []
        return parts

    def _schema(self, name: str) -> Schema:
        schema = self._tools.get(name)
        return Schema(schema, schema)

    def _write(self, fragment: str) -> None:
        if fragment:
            self._parts.append(Fragment(fragment))

    def _complete(self) -> None:
        self._parts.append(Done())
        self._calls += 1
        self._cursor.restart()

    def _close(self, marked: bool) -> bool:
        return self._end(Closed(self._cursor.rest, marked))

    def _break(self) -> bool:
        return self._end(Broken(self._cursor.read, self._cursor.rest))

    def _end(self, part: Part) -> bool:
        self._parts.append(part)
        self._over = True
        return False


_SPACE = re.compile(r"\s*")
_HEAD = re.compile(rf"\s{{0,64}}call:([^{{}}\[\]\n{MARKS}]{{1,256}})(?=\{{)")
_HEAD_BEGUN = re.compile(rf"\s{{0,64}}(?:c|ca|cal|call|call:[^{{}}\[\]\n{MARKS}]{{0,256}})?\Z")


class Braces(_Reader):
    """`call:NAME{key:value,...}`, whose object is loose JSON."""

    def __init__(self, tools: Tools, spell: Callable[[str], str]):
        super().__init__(tools, spell)
        self._step = self._head
        self._object: LooseJSON | None = None

    def finish(self, stopped: bool) -> list[Part]:
        self._close(marked=False) if self._calls and self._step == self._between else self._break()
        return self._given()

    def _head(self) -> bool:
        found = self._cursor.match(_HEAD)
        if found is None:
            return False if self._cursor.match(_HEAD_BEGUN) else self._break()
        self._cursor.skip(len(found[0]))
        name = found[1].strip()
        self._parts.append(Named(name))
        self._object = LooseJSON(self._cursor, self._schema(name), self._spell)
        self._step = self._arguments
        return True

    def _arguments(self) -> bool:
        assert self._object is not None
        self._write(self._object.read())
        if self._object.failed:
            return self._break()
        if self._object.done:
            self._complete()
            self._step = self._between
        return self._object.done

    def _between(self) -> bool:
        self._cursor.take(_SPACE)
        mark = self._cursor.next
        if mark == Mark.CALL_CLOSE:
            self._cursor.skip(1)
            return self._close(marked=True)
        if self._cursor.match(_HEAD):
            self._step = self._head
            return True
        return False if self._cursor.match(_HEAD_BEGUN) else self._close(marked=False)


_NAME = rf"[^<>\n{MARKS}]{{1,256}}"
_TOKEN = re.compile(
    rf"\s+|<parameter=(?P<parameter>{_NAME})>|<function=(?P<function>{_NAME})>"
    rf"|</parameter>|</function>|[{MARKS}]|<|[^\s<{MARKS}]+"
)
_TAGS = ("<parameter=", "<function=", "</parameter>", "</function>")
_TAG_BEGUN = re.compile(
    "|".join(re.escape(tag[:size]) + r"\Z" for tag in _TAGS for size in range(1, len(tag)))
    + rf"|<(?:parameter|function)={_NAME.replace('{1,', '{0,')}\Z"
)
_PARAMETER_END = "</parameter>"
_FUNCTION_END = "</function>"


@dataclass(frozen=True)
class _Token:
    """White space, a tag, a marker or other text. A name belongs to an opening tag."""

    text: str
    parameter: str | None = None
    function: str | None = None

    @property
    def blank(self) -> bool:
        return self.text.isspace()


class Tags(_Reader):
    """`<function=NAME><parameter=KEY>VALUE</parameter></function>`, or `{"name": NAME, "arguments": {...}}`.

    A value is raw text and may hold anything. Its end is a `</parameter>` after which a call can go on or end; calls
    quoted in it, between markers of their own, are passed over.
    """

    def __init__(self, tools: Tools, spell: Callable[[str], str]):
        super().__init__(tools, spell)
        self._step = self._read_token
        self._state: Callable[[_Token], None] = self._outside
        self._name = ""
        self._arguments: list[str] = []  # the names of those that were written
        self._value = _Value(Schema())
        self._quoted_calls = 0
        self._pending: list[str] = []  # read, and not yet known to be the value's
        self._json: list[str] = []
        self._final = False

    def finish(self, stopped: bool) -> list[Part]:
        self._final = True
        while not self._over and self._step():
            pass
        if not self._over:
            self._finish(stopped)
        return self._given()

    def _finish(self, stopped: bool) -> None:
        if stopped and self._state in (self._after_value, self._cut_short):
            self._end_value()
        if stopped and self._state == self._parameters and self._arguments:
            self._end_function()
        if stopped and self._state == self._object:
            self._end_object()
        if not self._over:
            self._close(marked=False) if self._state == self._outside and self._calls else self._break()

    def _read_token(self) -> bool:
        if not self._cursor.left or (not self._final and self._cursor.match(_TAG_BEGUN)):
            return False
        found = self._cursor.match(_TOKEN)
        assert found is not None, "every character begins some token"
        self._cursor.skip(len(found[0]))
        self._state(_Token(found[0], found["parameter"], found["function"]))
        return True

    def _unread(self, token: _Token) -> None:
        self._cursor.skip(-len(token.text))

    def _outside(self, token: _Token) -> None:
        if token.function is not None:
            self._name, self._arguments, self._state = token.function.strip(), [], self._parameters
        elif token.text == Mark.CALL_CLOSE and self._calls:
            self._close(marked=True)
        elif token.text.startswith("{") and not self._calls:
            self._json, self._state = [token.text], self._object
        elif not token.blank and not (self._calls and token.text in (_PARAMETER_END, _FUNCTION_END)):
            self._unread(token)
            self._close(marked=False) if self._calls else self._break()

    def _parameters(self, token: _Token) -> None:
        if token.parameter is not None:
            self._begin_value(token.parameter.strip())
        elif token.text == _FUNCTION_END:
            self._end_function()
        elif token.text == Mark.CALL_CLOSE or token.function is not None:
            self._unread(token)
            self._end_function()
        elif not token.blank and not (token.text == _PARAMETER_END and self._arguments):
            self._unread(token)
            self._break()

    def _begin_value(self, key: str) -> None:
        if not self._arguments:
            self._parts.append(Named(self._name))
        self._write(("," if self._arguments else "{") + quoted(key) + ":")
        self._arguments.append(key)
        self._value = _Value(self._schema(self._name).member(key))
        self._quoted_calls = 0
        self._state = self._in_value

    def _in_value(self, token: _Token) -> None:
        doubts = {_PARAMETER_END: self._after_value, _FUNCTION_END: self._cut_short}
        if token.text in doubts and not self._quoted_calls:
            self._pending, self._state = [token.text], doubts[token.text]
        elif token.text == Mark.CALL_OPEN:
            self._pending, self._state = [token.text], self._quoting
        else:
            self._quoted_calls -= token.text == Mark.CALL_CLOSE and self._quoted_calls > 0
            self._write(self._value.add(self._spell(token.text)))

    def _after_value(self, token: _Token) -> None:
        """Behind `</parameter>`, which may be text that the value quotes."""
        named = token.parameter is not None or token.function is not None
        if token.blank:
            self._pending.append(token.text)
        elif named or token.text in (_PARAMETER_END, _FUNCTION_END, Mark.CALL_CLOSE):
            self._end_value()
            self._parameters(token)
        else:
            self._resume_value(token)

    def _cut_short(self, token: _Token) -> None:
        """Behind `</function>` within a value: its `</parameter>` was forgotten if the block ends here."""
        if token.blank:
            self._pending.append(token.text)
        elif token.text == Mark.CALL_CLOSE:
            self._end_value()
            self._parameters(token)
        else:
            self._resume_value(token)

    def _quoting(self, token: _Token) -> None:
        """Behind an opening marker within a value: a call that the value quotes, or the marker's mention."""
        if token.blank:
            self._pending.append(token.text)
        else:
            self._quoted_calls += token.function is not None
            self._resume_value(token)

    def _resume_value(self, token: _Token) -> None:
        self._write(self._value.add(self._spell("".join(self._pending))))
        self._state = self._in_value
        self._in_value(token)

    def _end_value(self) -> None:
        self._write(self._value.end())
        self._state = self._parameters

    def _end_function(self) -> None:
        if not self._arguments:
            self._parts.append(Named(self._name))
        self._write("}" if self._arguments else "{}")
        self._complete()
        self._state = self._outside

    def _object(self, token: _Token) -> None:
        if token.text not in (Mark.CALL_OPEN, Mark.CALL_CLOSE):
            self._json.append(token.text)
        elif token.text == Mark.CALL_CLOSE and self._end_object():
            self._close(marked=True)
        else:
            self._unread(token)
            self._break()

    def _end_object(self) -> bool:
        found = _name_and_arguments(self._spell("".join(self._json)))
        if found is None:
            return False
        self._parts += [Named(found[0]), Fragment(found[1])]
        self._complete()
        self._state = self._outside
        return True


def _name_and_arguments(text: str) -> tuple[str, str] | None:
    """A call that is one JSON object. Whatever JSON cannot say exactly in Python is no call."""
    try:
        call = json.loads(text)
        arguments = call["arguments"]
        if not isinstance(call["name"], str) or not isinstance(arguments, dict):
            return None
        return call["name"], json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


# A null with its line breaks is no longer than this.
_SHORT = 8


class _Value:
    """A parameter's raw text -> JSON by its schema. A text streams; the line breaks at its ends are the template's."""

    def __init__(self, schema: Schema):
        self._schema = schema
        self._types = schema.types
        self._held = held(self._types)
        self._text: list[str] = []
        self._size = 0
        self._streaming = False

    def add(self, text: str) -> str:
        self._text.append(text)
        self._size += len(text)
        if self._held == "all" or (self._held == "short" and self._size <= _SHORT and not self._streaming):
            return ""
        return self._stream()

    def _stream(self) -> str:
        text = "".join(self._text)
        if not self._streaming:
            text = text.removeprefix("\n")
        known = text.removesuffix("\n")
        self._text = [text[len(known) :]]
        begun, self._streaming = self._streaming, True
        return ("" if begun else '"') + quoted(known)[1:-1]

    def end(self) -> str:
        if self._streaming:
            return '"'
        text = "".join(self._text).removeprefix("\n").removesuffix("\n")
        return scalar(text, self._types) or self._structure(text) or quoted(text)

    def _structure(self, text: str) -> str | None:
        if self._types and not self._types & {"object", "array"}:
            return None
        # Where text is allowed too, only JSON is taken for more: "[draft]" is text.
        may_be_text = not self._types or "string" in self._types
        return None if may_be_text and not _is_json(text) else read_whole(text, self._schema)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
