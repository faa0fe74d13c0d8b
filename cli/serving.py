"""A server from the command line: its door, what it says on a terminal, and its end."""

import logging
import secrets
import signal
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from mtp_mlx.cli.display import Notes, note
from mtp_mlx.cli.options import Cached, Parts
from mtp_mlx.engine import Engine
from mtp_mlx.errors import RequestError
from mtp_mlx.loading import Loaded
from mtp_mlx.sampling import choose_sampler
from mtp_mlx.server.app import make_app
from mtp_mlx.server.guard import LOOPBACK, Access
from mtp_mlx.server.limits import Limits
from mtp_mlx.server.run import Server, listen
from mtp_mlx.server.service import Defaults, Service

LEVELS = ("debug", "info", "warning", "error")
_CLOSING = 5.0  # seconds for the engine to end


@dataclass(frozen=True)
class Door:
    """Where a server listens, and to whom."""

    host: str
    port: int
    hosts: tuple[str, ...] = ()  # other names by which clients call this machine
    origins: tuple[str, ...] = ()  # of web pages that may ask
    key: str | None = None
    key_file: Path | None = None

    def choose_key(self) -> tuple[str | None, bool]:
        """The key that clients have to send, and whether it is new: where others can come in there has to be one.

        Raises RequestError for a key that is none.
        """
        key = self._given()
        if key is not None or self.host.lower() in LOOPBACK:
            return key, False
        return secrets.token_urlsafe(24), True

    def _given(self) -> str | None:
        if self.key is not None and self.key_file is not None:
            raise RequestError("--api-key and --api-key-file are both given; leave one out")
        key = self.key
        if self.key_file is not None:
            try:
                key = self.key_file.read_text("utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise RequestError(f"--api-key-file {self.key_file} cannot be read: {error}") from None
        if key is not None and not key.strip():
            raise RequestError("the API key is empty; give one, or leave it out")
        return key


def serve(
    parts: Parts,
    cached: Cached,
    door: Door,
    defaults: Defaults,
    names: tuple[str, ...],
    context: int | None,
    slots: int,
    log_level: str,
) -> None:
    """Serve a pair until a signal comes. Raises RequestError for what cannot be served, or not there."""
    _check(defaults, log_level)
    key, made = door.choose_key()
    access = Access.of(door.host, (*door.hosts, socket.gethostname()), door.origins, key)
    with Notes(log_level == "debug") as notes, listen(door.host, door.port) as bound:
        loaded = parts.load()
        notes.show()
        _report(log_level)
        engine = Engine(loaded.pair, loaded.tokenizer, cached.open(loaded), slots=slots)
        service = Service.of(loaded, engine, slots=slots, names=names, context=context, defaults=defaults)
        service.conversations.check_switch(defaults.thinking)
        threading.Thread(target=service.prepare, daemon=True).start()
        bound.listen()  # who comes at once is answered as soon as the application is made
        _announce(loaded, service, bound, key if made else None)
        _run(service, access, bound)


def _check(defaults: Defaults, log_level: str) -> None:
    if log_level not in LEVELS:
        raise RequestError(f"--log-level {log_level} is not one of {', '.join(LEVELS)}")
    if defaults.max_tokens == 0 or defaults.max_tokens < -1:
        raise RequestError(f"--max-tokens {defaults.max_tokens} is neither -1 nor at least 1")
    choose_sampler(defaults.temperature, defaults.top_p, defaults.min_p, defaults.top_k)


def _report(level: str) -> None:
    """From now on what happens is written line by line."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    for name, least in (("mtp_mlx", level.upper()), ("uvicorn.error", "WARNING")):
        log = logging.getLogger(name)
        log.handlers, log.propagate = [handler], False
        log.setLevel(least)


def _announce(loaded: Loaded, service: Service, bound: socket.socket, new_key: str | None) -> None:
    address, port = bound.getsockname()[:2]
    shown = f"[{address}]" if ":" in address else address
    note(f"model: {service.name}, context {service.context}")
    note(f"drafter: {loaded.drafter or 'none'} ({loaded.drafter_reason})")
    if loaded.adapter:
        note(f"adapter: {loaded.adapter}")
    if new_key:
        note(f"others can reach this address, so clients have to send this key: {new_key}")
    note(f"listening on http://{shown}:{port} (API under /v1); Ctrl-C ends it")


def _run(service: Service, access: Access, bound: socket.socket) -> None:
    """Until a signal comes; uvicorn ends in good order and then raises it again."""
    limits = Limits()
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with suppress(KeyboardInterrupt):
            Server(make_app(service, limits, access), service.engine, limits).run([bound])
    finally:
        signal.signal(signal.SIGTERM, before)
        service.engine.close(_CLOSING)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
