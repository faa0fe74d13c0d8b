"""Answers of `/v1/chat/completions`."""

from collections.abc import Sequence
from typing import Any

from mtp_mlx.engine import Token
from mtp_mlx.server.figures import extras
from mtp_mlx.server.reply import Delta, Reply
from mtp_mlx.server.shape import Choices, Chunk, finite
from mtp_mlx.server.spelling import token_bytes, token_text
from mtp_mlx.server.wire import ChatRequest
from mtp_mlx.speech import Content, Event, Reasoning, ToolCallArguments, ToolCallStart


class Chat(Choices[ChatRequest]):
    """OpenAI's shape of a chat's answer. Reasoning is told apart as `reasoning_content`.

    A call goes out while it is written. One that breaks cannot be taken back: its text follows as content, and the
    answer does not end with "tool_calls" unless another call was whole.
    """

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def begin(self) -> list[Chunk]:
        start = {"role": "assistant", "content": ""}
        return [self._chunk([_choice(number, start)]) for number in range(len(self._replies))]

    def add(self, number: int, delta: Delta) -> list[Chunk]:
        changes = [change for event in delta.said if (change := _change(event))]
        tokens = delta.tokens
        chunks = []
        for change in changes or ([{}] if tokens and self._tells_tokens else []):
            chunks.append(self._told(number, change, tokens))
            tokens = ()
        if delta.finish:
            last = self._chunk([_choice(number, {}, delta.finish)])
            chunks.append(last | extras(self._replies[number]))
        return chunks

    def whole(self, replies: Sequence[Reply]) -> Chunk:
        return self._whole([self._whole_choice(number, reply) for number, reply in enumerate(replies)], replies)

    @property
    def _tells_tokens(self) -> bool:
        return bool(self._body.logprobs or self._body.show_drafts)

    def _told(self, number: int, change: Chunk, tokens: Sequence[Token]) -> Chunk:
        """A chunk that also tells of tokens."""
        choice = _choice(number, change)
        if self._body.logprobs:
            choice["logprobs"] = self._logprobs(tokens)
        return self._chunk([choice], tokens)

    def _whole_choice(self, number: int, reply: Reply) -> Chunk:
        calls = [_call(*call) for call in reply.calls.values()]
        message: Chunk = {"role": "assistant", "content": reply.content or (None if calls else ""), "refusal": None}
        if reply.thoughts:
            message["reasoning_content"] = reply.thoughts
        if calls:
            message["tool_calls"] = calls
        logprobs = self._logprobs(reply.tokens) if self._body.logprobs else None
        return {"index": number, "message": message, "logprobs": logprobs, "finish_reason": reply.finish}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        return {"content": [self._logprob(token) for token in tokens], "refusal": None}

    def _logprob(self, token: Token) -> dict[str, Any]:
        best = [self._spelled(other, logprob) for other, logprob in token.top]
        return self._spelled(token.id, token.logprob) | {"top_logprobs": best}

    def _spelled(self, token: int, logprob: float | None) -> dict[str, Any]:
        text, spelled = token_text(self._tokenizer, token), token_bytes(self._tokenizer, token)
        return {"token": text, "logprob": finite(logprob), "bytes": spelled}


def _choice(number: int, change: Chunk, finish: str | None = None) -> Chunk:
    return {"index": number, "delta": change, "logprobs": None, "finish_reason": finish}


def _change(event: Event) -> Chunk | None:
    match event:
        case Content(text):
            return {"content": text}
        case Reasoning(text):
            return {"reasoning_content": text}
        case ToolCallStart(index, key, name):
            return {"tool_calls": [{"index": index, **_call(key, name, "")}]}
        case ToolCallArguments(index, fragment):
            return {"tool_calls": [{"index": index, "function": {"arguments": fragment}}]}
        case _:
            return None


def _call(key: str, name: str, arguments: str) -> Chunk:
    return {"id": key, "type": "function", "function": {"name": name, "arguments": arguments}}
