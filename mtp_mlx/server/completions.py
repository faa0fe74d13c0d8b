"""Answers of `/v1/completions`."""

from collections.abc import Sequence
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mtp_mlx.engine import Token
from mtp_mlx.server.asking import Task
from mtp_mlx.server.figures import extras
from mtp_mlx.server.reply import Delta, Reply
from mtp_mlx.server.shape import Choices, Chunk, Frame, finite
from mtp_mlx.server.spelling import token_bytes, token_text
from mtp_mlx.server.wire import CompletionRequest


class Completions(Choices[CompletionRequest]):
    """OpenAI's shape of raw texts."""

    kind = chunk_kind = "text_completion"

    def __init__(
        self, frame: Frame, body: CompletionRequest, task: Task, replies: Sequence[Reply], tokens: TokenizerWrapper
    ):
        super().__init__(frame, body, task, replies, tokens)
        self._lengths = [0] * len(replies)  # characters told of each text

    def begin(self) -> list[Chunk]:
        if not self._body.echo:
            return []
        return [self._chunk([self._choice(i, self._echo(i), ())]) for i in range(len(self._replies))]

    def add(self, number: int, delta: Delta) -> list[Chunk]:
        text, tokens, chunks = delta.content, delta.tokens, list[Chunk]()
        if text or self._tells(tokens):
            chunks.append(self._chunk([self._choice(number, text, tokens)], tokens))
        if delta.finish:
            last = self._chunk([self._choice(number, "", (), _reason(delta.finish))])
            chunks.append(last | extras(self._replies[number]))
        return chunks

    def whole(self, replies: Sequence[Reply]) -> Chunk:
        choices = []
        for number, reply in enumerate(replies):
            text = self._echo(number) + reply.content
            choices.append(self._choice(number, text, reply.tokens, _reason(reply.finish)))
        return self._whole(choices, replies)

    def _tells(self, tokens: Sequence[Token]) -> bool:
        return bool(tokens) and (self._body.logprobs is not None or bool(self._body.show_drafts))

    def _choice(self, number: int, text: str, tokens: Sequence[Token], finish: str | None = None) -> Chunk:
        logprobs = self._logprobs(number, tokens) if self._body.logprobs is not None and tokens else None
        return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _echo(self, number: int) -> str:
        if not self._body.echo:
            return ""
        prompt = self._body.prompt
        if isinstance(prompt, str):
            return prompt
        given = prompt[number // self._task.copies]
        return given if isinstance(given, str) else str(self._tokenizer.decode(self._replies[number].prompt))

    def _logprobs(self, number: int, tokens: Sequence[Token]) -> dict[str, Any]:
        offsets = []
        for token in tokens:
            offsets.append(self._lengths[number])
            self._lengths[number] += len(token.text)
        return {
            "tokens": [self._spelled(token.id) for token in tokens],
            "token_logprobs": [finite(token.logprob) for token in tokens],
            "top_logprobs": [self._best(token) for token in tokens],
            "text_offset": offsets,
        }

    def _best(self, token: Token) -> dict[str, float]:
        best: dict[str, float] = {}
        for other, logprob in token.top:  # the most probable one first, which counts where others are spelled alike
            best.setdefault(self._spelled(other), finite(logprob))
        return best

    def _spelled(self, token: int) -> str:
        """Its text, or as OpenAI spells what is no whole character: by its bytes."""
        text = token_text(self._tokenizer, token)
        if "\ufffd" not in text:
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes(self._tokenizer, token))


def _reason(finish: str | None) -> str:
    return "length" if finish == "length" else "stop"
