"""What a model says, token by token -> content, reasoning and tool calls.

Markers are told by token id and by where they stand (`mtp_mlx/marks.py`), calls are read by `mtp_mlx/tool_calls.py`.
No text is lost but markers and the line breaks beside them, which a chat template writes again. A call that makes no
sense is said as it was written, where it stood.
"""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Literal
from uuid import uuid4

from mtp_mlx.dialects import Dialect
from mtp_mlx.marks import MARKS, Mark, Marking
from mtp_mlx.tool_calls import Broken, CallReader, Closed, Done, Fragment, Named, Part, Tools, call_reader

_log = logging.getLogger(__name__)

Reason = Literal["stop", "length"]


@dataclass(frozen=True)
class Content:
    """Text of the answer."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """Text of the thoughts before it."""

    text: str


@dataclass(frozen=True)
class ToolCallStart:
    """A call has begun. It came out only if its `ToolCallEnd` follows; else its text comes as content."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class ToolCallArguments:
    """A piece of a call's arguments; all of them together are one JSON object."""

    index: int
    fragment: str


@dataclass(frozen=True)
class ToolCallEnd:
    """The call is complete."""

    index: int


Event = Content | Reasoning | ToolCallStart | ToolCallArguments | ToolCallEnd

# More line breaks before a marker than these are text.
_BREAKS = 8
_QUOTES = ("'", '"', "`")
_MARK = re.compile(f"[{MARKS}]")


def _new_id() -> str:
    return f"call_{uuid4().hex}"


class Parser:
    """Reads one reply. `feed` takes every token with the text that its detokenizer gave, `finish` ends the reply.

    `tools` maps a tool's name to the JSON schema of its arguments; without tools nothing is a call. `starts_thinking`
    says that the prompt ended within a block of reasoning. Neither method raises.
    """

    def __init__(
        self, dialect: Dialect, *, tools: Tools, starts_thinking: bool = False, new_id: Callable[[], str] = _new_id
    ):
        self._marking = Marking(dialect.markers)
        self._dialect = dialect
        self._tools = tools
        self._new_id = new_id
        self._events: list[Event] = []
        self._thinking = starts_thinking
        self._calls: CallReader | None = None
        self._unclosed = False  # a block of calls ended without its marker, which may still come
        self._title: str | None = None  # what stands behind an opening marker of reasoning, while it is being read
        self._mention: Mark | None = None  # a marker behind a quotation mark, until the next character is known
        self._breaks = ""  # line breaks that belong to the text unless a marker follows
        self._fresh = starts_thinking  # a marker came last, and line breaks behind it are its own
        self._blank = True  # nothing but white space was said in this block
        self._last = ""
        self._begun = 0
        self.completed = 0

    def feed(self, token: int, text: str) -> list[Event]:
        """What a token adds; several tokens may be needed for an event, and one token may give several."""
        self._read(self._marking.feed(token, text))
        return self._given()

    def finish(self, reason: Reason) -> list[Event]:
        """What is left when the model has stopped, or was cut off ("length")."""
        self._read(self._marking.flush())
        while self._calls is not None:
            self._read(self._take(self._calls.finish(reason == "stop")))
        if self._title is not None and self._title != self._dialect.title.rstrip("\n"):
            self._say(self._spelled(Mark.THINK_OPEN) + self._title)
        breaks, self._breaks = self._breaks, ""
        self._emit(breaks)
        return self._given()

    def finish_reason(self, reason: Reason) -> Literal["stop", "length", "tool_calls"]:
        """The reason to tell a client: "tool_calls" only if a call came out whole and the model stopped by itself."""
        return "tool_calls" if self.completed and reason == "stop" else reason

    def _given(self) -> list[Event]:
        events, self._events = self._events, []
        return _merged(events)

    def _read(self, text: str) -> None:
        while text:
            text = self._read_some(text)

    def _read_some(self, text: str) -> str:
        """Reads the beginning of a text in the present state and returns the rest."""
        if self._calls is not None:
            return self._take(self._calls.feed(text))
        if self._title is not None:
            return self._read_title(text)
        if self._mention is not None and text[0] == self._last:
            self._say(self._spelled(self._mention))
            self._mention = None
        elif self._mention is not None:
            self._settle_mention()
        found = _MARK.search(text)
        if found is None:
            self._say(text)
            return ""
        self._say(text[: found.start()])
        self._read_mark(Mark(found[0]))
        return text[found.end() :]

    def _read_mark(self, mark: Mark) -> None:
        if mark is Mark.STOP:
            return
        if mark is Mark.CALL_OPEN and self._tools:
            self._calls, self._unclosed = call_reader(self._dialect, self._tools, self._marking.spell), False
        elif mark is Mark.CALL_CLOSE and self._unclosed:
            self._unclosed = False
            self._begin()
        elif mark is Mark.THINK_CLOSE and self._thinking and self._last in _QUOTES:
            self._mention = mark
        elif not self._opens_or_closes(mark):
            self._say(self._spelled(mark))

    def _opens_or_closes(self, mark: Mark) -> bool:
        """Whether the marker begins or ends reasoning, from where it stands; if so it is done."""
        if mark is Mark.THINK_CLOSE and (self._thinking or self._untouched):
            self._begin(thinking=False)
        elif mark is Mark.THINK_OPEN and self._thinking and self._blank:
            self._begin()  # the prompt has opened the block already
        elif mark is Mark.THINK_OPEN and not self._thinking and self._dialect.title and self._last not in _QUOTES:
            self._title = ""
        elif mark is Mark.THINK_OPEN and not self._thinking and not self._dialect.title and self._untouched:
            self._begin(thinking=True)
        else:
            return False
        return True

    @property
    def _untouched(self) -> bool:
        """Nothing was said or called in the answer yet."""
        return self._blank and not self._begun

    def _begin(self, thinking: bool | None = None) -> None:
        """What follows a marker: another block, or the same one again."""
        self._thinking = self._thinking if thinking is None else thinking
        self._breaks, self._last, self._fresh = "", "", True
        self._blank = self._blank or thinking is not None

    def _read_title(self, text: str) -> str:
        assert self._title is not None
        title = self._dialect.title
        if text[0] == Mark.THINK_CLOSE and self._title in ("", title.rstrip("\n")):
            self._title = None
            self._begin(thinking=False)
            return text[1:]
        if title.startswith(self._title + text[0]):
            self._title += text[0]
            if self._title == title:
                self._title = None
                self._begin(thinking=True)
            return text[1:]
        said, self._title = self._title, None
        self._say(self._spelled(Mark.THINK_OPEN) + said)
        return text

    def _settle_mention(self) -> None:
        if self._mention is not None:
            self._mention = None
            self._begin(thinking=False)

    def _take(self, parts: list[Part]) -> str:
        """Turns a reader's parts into events; returns the text behind the block where it is over."""
        rest = ""
        for part in parts:
            match part:
                case Named(name):
                    self._events.append(ToolCallStart(self._begun, self._new_id(), name))
                    self._begun += 1
                case Fragment(json):
                    self._events.append(ToolCallArguments(self._begun - 1, json))
                case Done():
                    self._events.append(ToolCallEnd(self._begun - 1))
                    self.completed += 1
                    self._begin()
                case Closed(rest, marked):
                    self._calls, self._unclosed = None, not marked
                case Broken(text, rest):
                    self._calls = None
                    self._say_broken(text)
        return rest

    def _say_broken(self, text: str) -> None:
        _log.warning("a tool call could not be read and is handed on as text, %d characters", len(text))
        self._say(self._marking.spell(text))

    def _spelled(self, mark: Mark) -> str:
        return self._marking.spell(mark.value)

    def _say(self, text: str) -> None:
        """Text of the present block, but for line breaks that may turn out to belong to a marker."""
        if self._fresh:
            text = text.lstrip("\n")
        if not text:
            return
        self._fresh = False
        self._last = text[-1]
        text = self._breaks + text
        kept = min(len(text) - len(text.rstrip("\n")), _BREAKS)
        self._breaks = text[len(text) - kept :]
        self._emit(text[: len(text) - kept])

    def _emit(self, text: str) -> None:
        if text:
            self._blank = self._blank and text.isspace()
            self._events.append(Reasoning(text) if self._thinking else Content(text))


def _merged(events: list[Event]) -> list[Event]:
    """Neighbouring pieces of the same text as one."""
    merged: list[Event] = []
    for kind, group in groupby(events, type):
        run = list(group)
        if kind is Content or kind is Reasoning:
            merged.append(kind("".join(event.text for event in run if isinstance(event, Content | Reasoning))))
        elif kind is ToolCallArguments:
            pieces = [event for event in run if isinstance(event, ToolCallArguments)]
            merged.append(ToolCallArguments(pieces[0].index, "".join(piece.fragment for piece in pieces)))
        else:
            merged += run
    return merged
