"""A socket, uvicorn on it, and an end in good order: running answers may finish, then they are told why they end."""

import asyncio
import errno
import socket
from asyncio import TimerHandle, create_task, to_thread

import h11
import uvicorn
from fastapi import FastAPI
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from mtp_mlx.engine import Engine
from mtp_mlx.errors import RequestError
from mtp_mlx.server.limits import Limits
from mtp_mlx.server.refusal import RETRY, RefusedError

HEADERS = 30.0  # seconds in which a request's headers have to be there
STALL = 120.0  # seconds that a client may leave what was sent to it unread
KEEP_ALIVE = 75  # seconds that an idle connection is kept
CLOSING = 3.0  # seconds for the engine to end its slice


def listen(host: str, port: int) -> socket.socket:
    """A bound socket, port 0 for any free one. Raises RequestError where that cannot be had."""
    try:
        (family, *_, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        bound = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise RequestError(f"--host {host} is no address of this machine ({error.strerror})") from None
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            raise RequestError(
                f"port {port} of {host} is taken; end what listens there, or choose another with --port"
            ) from None
        raise RequestError(f"cannot listen on port {port} of {host}: {error.strerror}") from None
    return bound


class Server(uvicorn.Server):
    """Serves an application until it is told to stop (`should_exit`, or a signal)."""

    def __init__(self, app: FastAPI, engine: Engine, limits: Limits):
        super().__init__(
            uvicorn.Config(
                app,
                http=Patient,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=limits.connections,
                timeout_keep_alive=KEEP_ALIVE,
                timeout_graceful_shutdown=int(limits.grace + CLOSING) + 1,
                h11_max_incomplete_event_size=limits.header,
            )
        )
        self._engine, self._grace = engine, limits.grace

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """No new requests; those that run have some seconds, then their streams end with an error."""
        ending = create_task(self._end())
        try:
            await super().shutdown(sockets)
            await self._hang_up()
        finally:
            ending.cancel()

    async def _end(self) -> None:
        await asyncio.sleep(self._grace)
        await to_thread(self._engine.close, CLOSING)

    async def _hang_up(self) -> None:
        """Who is still there after a second signal is not waited for, and its request ends as if it had left."""
        for connection in [*self.server_state.connections]:
            connection.transport.abort()
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=CLOSING)


class Patient(H11Protocol):
    """A connection that waits for ever neither for headers nor for a reader, and on which every error is JSON."""

    _deadline: TimerHandle | None = None
    _stalled: TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # uvicorn's own way would refuse those too who were here first.
        most, self.limit_concurrency = self.limit_concurrency, None
        if most is not None and len(self.connections) > most:
            self.app = _crowded
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._rest()
        self._flows()

    def pause_writing(self) -> None:
        super().pause_writing()
        # Who reads no more is gone: it would keep a place among those who are served. Closing would wait for it too.
        self._stalled = self.loop.call_later(STALL, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._flows()

    def _flows(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def send_400_response(self, msg: str) -> None:
        """For what is no HTTP. After an answer has begun nothing can be said any more."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            answer = _GARBLED.response()
            events = (
                h11.Response(status_code=400, headers=answer.raw_headers, reason=b"Bad Request"),
                h11.Data(data=bytes(answer.body)),
                h11.EndOfMessage(),
            )
            for event in events:
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _watch(self) -> None:
        """A deadline while headers are missing, none while a request is being answered."""
        if self.conn.their_state is not h11.IDLE:
            self._rest()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(HEADERS, self._hang_up)

    def _rest(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _hang_up(self) -> None:
        self.transport.close()


_CLOSE = {"Connection": "close"}
_GARBLED = RefusedError(
    400,
    "this is no HTTP/1.1 request that can be read: a line is malformed, Host is missing, or there are too many headers",
    headers=_CLOSE,
)


async def _crowded(scope: Scope, receive: Receive, send: Send) -> None:
    """What those are told who find all connections taken."""
    full = RefusedError(
        503,
        "too many connections are open already; close some, or ask again later",
        code="unavailable",
        headers=RETRY | _CLOSE,
    )
    await full.response()(scope, receive, send)
