"""Answers of `/infill`, as llama.cpp gives them."""

from collections.abc import Sequence
from typing import Any

from mtp_mlx.server.asking import Task
from mtp_mlx.server.figures import extras
from mtp_mlx.server.reply import Delta, Reply
from mtp_mlx.server.shape import Chunk, Frame


class Infills:
    """One text, without the wrapping of choices."""

    done = False

    def __init__(self, frame: Frame, task: Task):
        self._frame, self._task = frame, task

    def begin(self) -> list[Chunk]:
        return []

    def add(self, number: int, delta: Delta) -> list[Chunk]:
        if not delta.content or self._task.silent:
            return []
        return [
            {"content": delta.content, "tokens": [token.id for token in delta.tokens], "stop": False, "index": number}
        ]

    def end(self, replies: Sequence[Reply]) -> list[Chunk]:
        return [self._last("", [], replies[0])]

    def whole(self, replies: Sequence[Reply]) -> Chunk:
        reply = replies[0]
        if self._task.silent:
            return self._last("", [], reply)
        return self._last(reply.content, reply.ids, reply)

    def _last(self, text: str, tokens: list[int], reply: Reply) -> dict[str, Any]:
        kind = "word" if reply.stop is not None else "limit" if reply.finish == "length" else "eos"
        return {
            "index": 0,
            "content": text,
            "tokens": tokens,
            "model": self._frame.model,
            "stop": True,
            "stop_type": kind,
            "stopping_word": reply.stop or "",
            "tokens_predicted": 0 if self._task.silent else len(reply.ids),
            "tokens_evaluated": len(reply.prompt),
            "tokens_cached": reply.cached,
            "truncated": False,
            **extras(reply),
        }
