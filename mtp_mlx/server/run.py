"""A socket, uvicorn on it, and an end in good order: running answers may finish, then they are told why they end."""

import asyncio
import errno
import socket
from asyncio import TimerHandle, create_task, to_thread

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from mtp_mlx.engine import Engine
from mtp_mlx.errors import RequestError
from mtp_mlx.server.limits import Limits

HEADERS = 30.0  # seconds in which a request's headers have to be there
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
        finally:
            ending.cancel()

    async def _end(self) -> None:
        await asyncio.sleep(self._grace)
        await to_thread(self._engine.close, CLOSING)


class Patient(H11Protocol):
    """A connection that does not wait for ever for a request's headers."""

    _deadline: TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._rest()

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
