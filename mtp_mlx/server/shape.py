"""What an answer looks like on the wire: a reply's deltas -> chunks of a stream, or one body."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mtp_mlx.engine import Token
from mtp_mlx.server.asking import Task
from mtp_mlx.server.figures import extras, usage
from mtp_mlx.server.reply import Delta, Reply
from mtp_mlx.server.wire import Generation

Chunk = dict[str, Any]
Asked = TypeVar("Asked", bound=Generation)
LOWEST = -9999.0  # stands for a log-probability of minus infinity, which JSON cannot hold


class Shape(Protocol):
    """One wire's answers. A body is made of the same replies as chunks are."""

    done: bool  # whether a stream ends with [DONE]

    def begin(self) -> list[Chunk]:
        """What comes before any text."""
        ...

    def add(self, number: int, delta: Delta) -> list[Chunk]:
        """What a delta of the text with that number adds."""
        ...

    def end(self, replies: Sequence[Reply]) -> list[Chunk]:
        """What comes after all texts."""
        ...

    def whole(self, replies: Sequence[Reply]) -> Chunk:
        """The same as one body."""
        ...


@dataclass(frozen=True)
class Frame:
    """What all chunks of an answer share."""

    id: str
    model: str
    fingerprint: str
    created: int = field(default_factory=lambda: int(time.time()))

    def fields(self, kind: str) -> Chunk:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


class Choices(Generic[Asked]):
    """What OpenAI's two shapes have in common: chunks and bodies of choices, usage where it is wanted, drafts."""

    done = True
    kind: str  # of a body
    chunk_kind: str

    def __init__(self, frame: Frame, body: Asked, task: Task, replies: Sequence[Reply], tokenizer: TokenizerWrapper):
        self._frame, self._body, self._task, self._replies = frame, body, task, replies
        self._tokenizer = tokenizer

    def end(self, replies: Sequence[Reply]) -> list[Chunk]:
        if not self._body.include_usage:
            return []
        return [self._chunk([]) | {"usage": usage(replies, self._task), **extras(replies[0])}]

    def _chunk(self, choices: list[Chunk], tokens: Sequence[Token] | None = None) -> Chunk:
        """A chunk that also tells where tokens came from, if some are given and the client wants to know."""
        chunk = self._frame.fields(self.chunk_kind) | {"choices": choices}
        if self._body.include_usage:
            chunk["usage"] = None
        if tokens is not None and self._body.show_drafts:
            chunk["drafts"] = origins(tokens)
        return chunk

    def _whole(self, choices: list[Chunk], replies: Sequence[Reply]) -> Chunk:
        body = self._frame.fields(self.kind) | {"choices": choices, "usage": usage(replies, self._task)}
        if self._body.show_drafts:
            body["drafts"] = [origins(reply.tokens) for reply in replies]
        return body | extras(replies[0])


def origins(tokens: Sequence[Token]) -> list[list[str]]:
    """Each token's text and where it came from, for a page that shows drafts."""
    return [[token.text, token.origin] for token in tokens]


def finite(logprob: float | None) -> float:
    """A log-probability that JSON can hold."""
    return LOWEST if logprob is None else max(logprob, LOWEST)
