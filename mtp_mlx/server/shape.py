"""What an answer looks like on the wire: a reply's deltas -> chunks of a stream, or one body."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from mtp_mlx.engine import Token
from mtp_mlx.server.reply import Delta, Reply

Chunk = dict[str, Any]
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


def origins(tokens: Sequence[Token]) -> list[list[str]]:
    """Each token's text and where it came from, for a page that shows drafts."""
    return [[token.text, token.origin] for token in tokens]


def finite(logprob: float | None) -> float:
    """A log-probability that JSON can hold."""
    return LOWEST if logprob is None else max(logprob, LOWEST)
