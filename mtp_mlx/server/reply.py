"""One text as it comes: the engine's events -> what is said in it, why it ended, and what it took."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from mtp_mlx.dialects import Dialect
from mtp_mlx.engine import Event, Piece, Token
from mtp_mlx.generation import Progress
from mtp_mlx.server.asking import Task, Voice
from mtp_mlx.speech import Content, Parser, Reasoning, ToolCallArguments, ToolCallEnd, ToolCallStart
from mtp_mlx.speech import Event as Said
from mtp_mlx.stats import Stats

Finish = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class Delta:
    """What was said since the last one, and the tokens it was said with."""

    said: tuple[Said, ...]
    tokens: tuple[Token, ...] = ()
    finish: Finish | None = None

    @property
    def content(self) -> str:
        return "".join(said.text for said in self.said if isinstance(said, Content))


class Reply:
    """Reads one text."""

    def __init__(self, dialect: Dialect, voice: Voice, prompt: list[int], spell: Callable[[int], str]):
        self.prompt = prompt
        self.ids: list[int] = []
        self.deltas: list[Delta] = []
        self.stats = Stats(len(prompt))
        self.cached = 0  # tokens of the prompt that were not read again
        self.reasoning = 0  # tokens of thoughts
        self.finish: Finish | None = None
        self.stop: str | None = None
        self.first: float | None = None  # when the first token came
        self._voice, self._spell = voice, spell
        self._parser = Parser(dialect, tools=voice.tools, starts_thinking=voice.starts_thinking) if voice.chat else None
        self._thinks = voice.starts_thinking
        self._unsaid: list[Token] = []  # tokens that no delta has told of

    def feed(self, event: Event) -> Delta | None:
        """What an event adds, if anything. After the last one `finish` is set."""
        if isinstance(event, Progress):
            self.cached = event.cached
            return None
        self.first = self.first or time.monotonic()
        self.stats, self.stop = event.stats, event.stop
        said: list[Said] = []
        for token in event.tokens:
            said += self._read(token)
            if self._parser and self._voice.one_call and self._parser.completed:
                self.finish = "tool_calls"
                return self._told(said)
        if event.finish_reason:
            said += self._end(event)
        return self._told(said)

    def end(self, finish: Finish) -> Delta:
        """Ends it before the engine does."""
        self.finish = finish
        return Delta((), tuple(self._unsaid), finish)

    @property
    def calls(self) -> dict[int, tuple[str, str, str]]:
        """Id, name and arguments of the calls that came out whole, each by its index."""
        begun: dict[int, tuple[str, str, str]] = {}
        whole = {said.index for said in self.said if isinstance(said, ToolCallEnd)}
        for said in self.said:
            if isinstance(said, ToolCallStart) and said.index in whole:
                begun[said.index] = said.id, said.name, ""
            elif isinstance(said, ToolCallArguments) and said.index in whole:
                key, name, arguments = begun[said.index]
                begun[said.index] = key, name, arguments + said.fragment
        return begun

    @property
    def said(self) -> list[Said]:
        return [said for delta in self.deltas for said in delta.said]

    @property
    def content(self) -> str:
        return "".join(delta.content for delta in self.deltas)

    @property
    def thoughts(self) -> str:
        return "".join(said.text for said in self.said if isinstance(said, Reasoning))

    @property
    def tokens(self) -> list[Token]:
        return [token for delta in self.deltas for token in delta.tokens]

    def _read(self, token: Token) -> list[Said]:
        self.ids.append(token.id)
        if self._parser is None:
            token = self._spaced(token)
        self._unsaid.append(token)
        if self._parser is None:
            return [Content(token.text)] if token.text else []
        said = self._parser.feed(token.id, token.text)
        if said:
            self._thinks = isinstance(said[-1], Reasoning)
        self.reasoning += self._thinks
        return said

    def _spaced(self, token: Token) -> Token:
        """With the space at the very beginning that mlx-lm drops, though in a raw text it parts two words."""
        if len(self.ids) == 1 and not token.text.startswith(" ") and self._spell(token.id).startswith(" "):
            return replace(token, text=" " + token.text)
        return token

    def _end(self, piece: Piece) -> list[Said]:
        assert piece.finish_reason is not None
        self.finish = piece.finish_reason
        if self._parser is None:
            return []
        # A stop text cuts the model off as a limit does: a call that is not closed then is none.
        said = self._parser.finish("length" if piece.stop is not None else piece.finish_reason)
        self.finish = self._parser.finish_reason(piece.finish_reason)
        return said

    def _told(self, said: list[Said]) -> Delta | None:
        if not said and self.finish is None:
            return None
        delta = Delta(tuple(_joined(said)), tuple(self._unsaid), self.finish)
        self._unsaid.clear()
        self.deltas.append(delta)
        return delta


def replies(task: Task, dialect: Dialect, spell: Callable[[int], str]) -> list[Reply]:
    """One for each text of a task."""
    return [Reply(dialect, task.voice, request.prompt, spell) for request in task.requests]


def _joined(said: Sequence[Said]) -> list[Said]:
    """Neighbouring pieces of the same text as one."""
    joined: list[Said] = []
    for event in said:
        last = joined[-1] if joined else None
        match last, event:
            case Content(before), Content(text):
                joined[-1] = Content(before + text)
            case Reasoning(before), Reasoning(text):
                joined[-1] = Reasoning(before + text)
            case ToolCallArguments(index, before), ToolCallArguments(same, fragment) if index == same:
                joined[-1] = ToolCallArguments(index, before + fragment)
            case _:
                joined.append(event)
    return joined
