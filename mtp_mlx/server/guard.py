"""Who may ask, and how much: hosts, origins, keys, and bodies that come whole and in time. Plain ASGI.

A page in a browser can send requests to this machine. It gives itself away by its Origin, and one that has turned its
own name into this machine's address (DNS rebinding) by its Host.
"""

import asyncio
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mtp_mlx.server.body import check_body
from mtp_mlx.server.limits import MIB, Limits
from mtp_mlx.server.refusal import RefusedError

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
ANYWHERE = frozenset({"0.0.0.0", "::"})
OPEN = frozenset({"/", "/health", "/v1/health"})  # what is answered without a key
_METHODS = "GET, POST, OPTIONS"
_HOST = re.compile(r"(?:\[([0-9a-fA-F:.]+)\]|([^:\[\]/@\s]+))(?::\d{1,5})?")


@dataclass(frozen=True)
class Access:
    """Who is let in."""

    hosts: frozenset[str] = LOOPBACK  # names by which clients may call this server, in lower case
    addresses: bool = False  # whether any IP address will do as a name: a server that listens on all of them
    origins: frozenset[str] = frozenset()  # of pages that may ask, besides the server's own
    key: str | None = None

    @classmethod
    def of(
        cls, bound: str, hosts: tuple[str, ...] = (), origins: tuple[str, ...] = (), key: str | None = None
    ) -> "Access":
        """For a server that listens on an address."""
        names = LOOPBACK | {bound.lower()} | {host.lower() for host in hosts}
        return cls(names - ANYWHERE, bound in ANYWHERE, frozenset(origin.rstrip("/") for origin in origins), key)

    def knows(self, host: str) -> bool:
        """Whether a Host header names this server. A page that rebinds a name has to call it by that name."""
        found = _HOST.fullmatch(host)
        if found is None:
            return False
        name = (found[1] or found[2]).lower().rstrip(".")
        return name in self.hosts or name.endswith(".localhost") or (self.addresses and _is_address(name))

    def welcomes(self, origin: str, host: str) -> bool:
        """Whether a page of that origin may ask: it is on the list, or came from this very server."""
        return origin in self.origins or origin in (f"http://{host}", f"https://{host}")

    def holds(self, headers: Headers) -> bool:
        """Whether the key is there, or none is asked for. Headers are bytes, read as Latin-1."""
        if self.key is None:
            return True
        bearer = headers.get("authorization", "")
        scheme, _, token = bearer.partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        return hmac.compare_digest(given.encode("latin-1"), self.key.encode())


class Guard:
    """Lets through what may pass, with its whole body."""

    def __init__(self, app: ASGIApp, access: Access, limits: Limits):
        self.app, self.access, self.limits = app, access, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._other(scope, receive, send)
            return
        # A slash at the end makes no other path.
        scope["path"] = scope["path"].rstrip("/") or "/"
        headers = Headers(scope=scope)
        try:
            allowed = self._check(scope, headers)
            send = _with_origin(send, allowed) if allowed else send
            if allowed and scope["method"] == "OPTIONS":
                await _preflight(headers, send)
                return
            self._check_key(scope, headers)
            receive = await self._take_body(scope, headers, receive)
        except RefusedError as refusal:
            await refusal.response()(scope, receive, send)
            return
        await self.app(scope, receive, send)

    async def _other(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        await self.app(scope, receive, send)

    def _check(self, scope: Scope, headers: Headers) -> str | None:
        """The origin of the page that asks and may, if it is one."""
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self.access.knows(hosts[0]):
            shown = ", ".join(hosts)[:80] or "none"
            raise RefusedError(403, f"this server is not called {shown!r}; start it with --allow-host for other names")
        origins = headers.getlist("origin")
        if not origins:
            return None
        if len(origins) > 1 or not self.access.welcomes(origins[0], hosts[0]):
            shown = ", ".join(origins)[:80]
            raise RefusedError(
                403, f"pages of {shown!r} may not ask this server; start it with --allow-origin for them"
            )
        return origins[0]

    def _check_key(self, scope: Scope, headers: Headers) -> None:
        if scope["path"] in OPEN and scope["method"] in ("GET", "HEAD"):
            return
        if not self.access.holds(headers):
            raise RefusedError(
                401,
                "the API key is missing or wrong; send 'Authorization: Bearer KEY' or 'x-api-key: KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _take_body(self, scope: Scope, headers: Headers, receive: Receive) -> Receive:
        """Reads the body; what is left to receive afterwards is it, and that the client has gone."""
        _check_length(headers, scope["method"], self.limits.body)
        try:
            async with asyncio.timeout(self.limits.arrival):
                body = await _read(receive, self.limits.body)
        except TimeoutError:
            raise RefusedError(
                408, f"the body did not come within {self.limits.arrival:g} seconds", headers=_CLOSE
            ) from None
        if len(body) > MIB:
            await asyncio.to_thread(check_body, body, self.limits.nesting)
        else:
            check_body(body, self.limits.nesting)
        return _replayed(body, receive)


_CLOSE: Mapping[str, str] = {"Connection": "close"}  # what is still on its way would be taken for another request


def _check_length(headers: Headers, method: str, most: int) -> None:
    length = headers.get("content-length")
    if length is not None and not length.isdecimal():
        raise RefusedError(400, f"content-length {length[:20]!r} is no number", headers=_CLOSE)
    if length is not None and int(length[:20]) > most:
        raise RefusedError(413, _too_large(most), headers=_CLOSE)
    if length is not None and "transfer-encoding" in headers:
        raise RefusedError(400, "content-length and transfer-encoding contradict each other; send one", headers=_CLOSE)
    if method != "POST":
        return
    if length is None and "chunked" not in headers.get("transfer-encoding", "").lower():
        raise RefusedError(411, "a body is needed, with a content-length or in chunks")
    kind = headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "application/json":
        raise RefusedError(415, f"content-type {kind[:80]!r} is not application/json", headers=_CLOSE)
    packed = headers.get("content-encoding", "identity")
    if packed.strip().lower() != "identity":
        raise RefusedError(415, f"content-encoding {packed[:80]!r} is not read; send the body as it is", headers=_CLOSE)


async def _read(receive: Receive, most: int) -> bytes:
    chunks, size, more = list[bytes](), 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise RefusedError(400, "the body is cut off", headers=_CLOSE)
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        if size > most:
            raise RefusedError(413, _too_large(most), headers=_CLOSE)
        more = message.get("more_body", False)
    return b"".join(chunks)


def _too_large(most: int) -> str:
    return f"the body is larger than {most} bytes; shorten the request"


def _replayed(body: bytes, receive: Receive) -> Receive:
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _with_origin(send: Send, origin: str) -> Send:
    """Tells a browser that the page may read the answer."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=message.setdefault("headers", []))
            headers["Access-Control-Allow-Origin"] = origin
            headers.append("Vary", "Origin")
        await send(message)

    return sending


async def _preflight(asked: Headers, send: Send) -> None:
    # The SDK sends headers of its own, which may be as many as it likes.
    wanted = asked.get("access-control-request-headers", "authorization, content-type, x-api-key")
    headers = [
        (b"access-control-allow-methods", _METHODS.encode()),
        (b"access-control-allow-headers", wanted.encode("latin-1")),
        (b"access-control-max-age", b"600"),
    ]
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
