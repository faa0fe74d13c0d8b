"""The routes that write text: chat, completions, infill."""

import asyncio
from functools import partial
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Response

from mtp_mlx.server.answer import Answer
from mtp_mlx.server.asking import Asking, Task
from mtp_mlx.server.chat import Chat
from mtp_mlx.server.completions import Completions
from mtp_mlx.server.infills import Infills
from mtp_mlx.server.limits import Limits
from mtp_mlx.server.refusal import DOCUMENTED
from mtp_mlx.server.reply import Reply, replies
from mtp_mlx.server.service import Service
from mtp_mlx.server.shape import Frame
from mtp_mlx.server.spelling import token_text
from mtp_mlx.server.wire import ChatRequest, CompletionRequest, InfillRequest

_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"description": "One body, or a stream of events", "content": {"text/event-stream": {}}}
}


class Writing:
    """Answers what asks for text."""

    def __init__(self, service: Service, asking: Asking, limits: Limits):
        self._service, self._asking, self._limits = service, asking, limits

    def router(self) -> APIRouter:
        router = APIRouter(responses=DOCUMENTED | _STREAM)
        router.post("/chat/completions", summary="Answer a conversation")(self.chat)
        router.post("/completions", summary="Continue a text, or fill its gap")(self.completions)
        return router

    def llama_router(self) -> APIRouter:
        router = APIRouter(responses=DOCUMENTED | _STREAM)
        router.post("/infill", summary="Fill the gap in a text")(self.infill)
        return router

    async def chat(self, body: ChatRequest) -> Response:
        # Templates and grammars take their time, which other requests need not wait for.
        task = await asyncio.to_thread(self._asking.chat, body)
        read = self._replies(task)
        shape = Chat(self._frame("chatcmpl"), body, task, read, self._service.tokenizer)
        return Answer(self._service, self._limits, task, read, shape, bool(body.stream))

    async def completions(self, body: CompletionRequest) -> Response:
        task = await asyncio.to_thread(self._asking.completion, body)
        read = self._replies(task)
        shape = Completions(self._frame("cmpl"), body, task, read, self._service.tokenizer)
        return Answer(self._service, self._limits, task, read, shape, bool(body.stream))

    async def infill(self, body: InfillRequest) -> Response:
        task = await asyncio.to_thread(self._asking.infill, body)
        shape = Infills(self._frame("infill"), task)
        return Answer(self._service, self._limits, task, self._replies(task), shape, bool(body.stream))

    def _replies(self, task: Task) -> list[Reply]:
        return replies(task, self._service.dialect, partial(token_text, self._service.tokenizer))

    def _frame(self, kind: str) -> Frame:
        return Frame(f"{kind}-{uuid4().hex}", self._service.name, self._service.fingerprint)
