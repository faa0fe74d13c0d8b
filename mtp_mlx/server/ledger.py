"""What became of each request: one line in the log, and the counters of `/metrics`. No text of any prompt."""

import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from uuid import uuid4

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mtp_mlx.server.metrics import Metrics
from mtp_mlx.server.reply import Reply

_log = logging.getLogger(__name__)
# What breaks a line, moves a cursor or turns text.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
CLIENT_GONE = 499  # nginx' status for it


@dataclass
class Account:
    """One request while it is served."""

    id: str = field(default_factory=lambda: f"req_{uuid4().hex}")
    began: float = field(default_factory=time.monotonic)
    status: int = 500  # until an answer begins
    failed: bool = False  # after it began
    replies: Sequence[Reply] = ()

    @property
    def outcome(self) -> str:
        if self.status == CLIENT_GONE:
            return "cancelled"
        if self.status >= 500 or self.failed:
            return "error"
        return "refused" if self.status >= 400 else "ok"


class Ledger:
    """Opens an account for each request and closes it when the answer is over."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        account = Account()
        scope.setdefault("state", {})["account"] = account
        try:
            await self.app(scope, receive, _noted(send, account))
        finally:
            self._close(scope, account)

    def _close(self, scope: Scope, account: Account) -> None:
        seconds = time.monotonic() - account.began
        self.metrics.count(scope["path"], account.outcome)
        for reply in account.replies:
            self.metrics.add(reply, reply.first and reply.first - account.began)
        level = logging.WARNING if account.outcome == "error" else logging.INFO
        _log.log(level, line(account, scope["method"], scope["path"], seconds))


def line(account: Account, method: str, path: str, seconds: float) -> str:
    """What the log says of a request."""
    where = _CONTROL.sub("?", f"{method} {path}"[:120])
    told = f"{account.id} {where} {account.status} {account.outcome} {1e3 * seconds:.0f} ms"
    if not account.replies:
        return told
    replies, stats = account.replies, [reply.stats for reply in account.replies]
    written, taken = sum(len(reply.ids) for reply in replies), sum(each.generation_seconds for each in stats)
    drafted, accepted = sum(each.drafted for each in stats), sum(each.accepted for each in stats)
    return (
        f"{told}, prompt {sum(len(reply.prompt) for reply in replies)} "
        f"(cached {sum(reply.cached for reply in replies)}), generated {written} "
        f"at {written / taken if taken else 0:.1f} tokens/s, accepted {accepted} of {drafted} drafts"
    )


def _noted(send: Send, account: Account) -> Send:
    async def noting(message: Message) -> None:
        if message["type"] == "http.response.start":
            account.status = message["status"]
            MutableHeaders(raw=message.setdefault("headers", []))["X-Request-Id"] = account.id
        await send(message)

    return noting
