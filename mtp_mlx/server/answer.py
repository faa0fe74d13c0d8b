"""The answer to a request that writes: as a stream or as one body, broken off when the client has gone."""

import asyncio
import json
import logging
import time
from collections.abc import Coroutine, Sequence
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mtp_mlx.errors import MTPError
from mtp_mlx.server.asking import Task
from mtp_mlx.server.ledger import CLIENT_GONE, Account
from mtp_mlx.server.limits import Limits
from mtp_mlx.server.refusal import RefusedError, refusal
from mtp_mlx.server.reply import Delta, Reply
from mtp_mlx.server.service import Service
from mtp_mlx.server.shape import Chunk, Shape
from mtp_mlx.server.source import Source

_log = logging.getLogger(__name__)
Told = tuple[int, Delta]
PING = b": ping\n\n"
_STREAM = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


class Answer(Response):
    """Writes texts as they come. An error before the first byte raises; after it, a stream ends with it."""

    def __init__(
        self, service: Service, limits: Limits, task: Task, replies: Sequence[Reply], shape: Shape, streamed: bool
    ):
        super().__init__()
        self._service, self._limits, self._task = service, limits, task
        self._replies, self._shape, self._streamed = replies, shape, streamed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        account: Account = scope["state"]["account"]
        source = Source(self._service.engine, self._task.requests)
        account.replies = self._replies
        work = self._stream(source, send, account) if self._streamed else self._body(source, send)
        try:
            if not await _unless_gone(work, receive):
                account.status = CLIENT_GONE
        finally:
            source.close()
            for reply in self._replies:
                self._service.conversations.remember(reply.prompt + reply.ids)

    async def _body(self, source: Source, send: Send) -> None:
        while not source.ended:
            await self._read(source, self._limits.ping)
        body = _json(self._shape.whole(self._replies))
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _stream(self, source: Source, send: Send, account: Account) -> None:
        # What cannot be served at all is known by then, and has a status of its own.
        chunks = self._shape.begin() + self._chunks(await self._read(source, self._limits.patience))
        await send({"type": "http.response.start", "status": 200, "headers": _STREAM})
        try:
            await _send(send, b"".join(map(_event, chunks)))
            await self._follow(source, send)
            last = b"".join(map(_event, self._shape.end(self._replies)))
            await _send(send, last + (b"data: [DONE]\n\n" if self._shape.done else b""))
        except Exception as error:
            account.failed = True
            await _send(send, _event(_failure(error, account)))
        await send({"type": "http.response.body", "body": b""})

    async def _follow(self, source: Source, send: Send) -> None:
        """Send what comes, and a sign of life where nothing was sent for long.

        A prompt that is being read brings events, of which there is nothing to tell.
        """
        sent = time.monotonic()
        while not source.ended:
            due = sent + self._limits.ping
            told = await self._read(source, max(0.0, due - time.monotonic()))
            data = b"".join(map(_event, self._chunks(told)))
            if not data and time.monotonic() >= due:
                data = PING
            if data:
                await _send(send, data)
                sent = time.monotonic()

    def _chunks(self, told: Sequence[Told]) -> list[Chunk]:
        return [chunk for number, delta in told for chunk in self._shape.add(number, delta)]

    async def _read(self, source: Source, seconds: float) -> list[Told]:
        """What has been said since, each with the number of its text; waits so many seconds for it at most."""
        told: list[Told] = []
        for number, event in await source.next(seconds):
            reply = self._replies[number]
            if reply.finish:
                continue
            delta = reply.feed(event)
            if delta:
                told.append((number, delta))
            if not reply.finish and self._is_late(reply):
                told.append((number, reply.end("length")))
            if reply.finish:
                source.close(number)
        return told

    def _is_late(self, reply: Reply) -> bool:
        limit = self._task.seconds
        return limit is not None and reply.first is not None and time.monotonic() - reply.first > limit


async def _unless_gone(work: Coroutine[Any, Any, None], receive: Receive) -> bool:
    """Do it, unless the client goes first; whether it was done."""
    working, watching = asyncio.create_task(work), asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            return False
        await working
        return True
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send(send: Send, data: bytes) -> None:
    if data:
        await send({"type": "http.response.body", "body": data, "more_body": True})


def _failure(error: Exception, account: Account) -> Chunk:
    """What a stream ends with when it cannot go on."""
    if isinstance(error, RefusedError):
        return error.body
    if isinstance(error, MTPError):
        return refusal(error).body
    _log.error("a fault in %s", account.id, exc_info=error)
    return fault(account).body


def fault(account: Account) -> RefusedError:
    """For a fault of ours, of which a client learns nothing else."""
    return RefusedError(500, f"a fault in the server; its log has it as {account.id}", code="fault")


def _json(value: Chunk) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _event(chunk: Chunk) -> bytes:
    return b"data: " + _json(chunk) + b"\n\n"
