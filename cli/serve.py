"""`mtp-mlx serve`: a model behind OpenAI's and llama.cpp's HTTP interfaces."""

import logging
import secrets
import signal
import socket
import threading
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from mtp_mlx.cli.display import Notes, note
from mtp_mlx.cli.options import (
    Adapter,
    Cached,
    Drafter,
    DrafterBits,
    Dtype,
    KvBits,
    Model,
    Parts,
    PromptCache,
    parse_depth,
)
from mtp_mlx.engine import SLOTS, Engine
from mtp_mlx.errors import RequestError
from mtp_mlx.hub import DEMO
from mtp_mlx.loading import Loaded
from mtp_mlx.sampling import choose_sampler
from mtp_mlx.server.app import make_app
from mtp_mlx.server.guard import LOOPBACK, Access
from mtp_mlx.server.limits import Limits
from mtp_mlx.server.run import Server, listen
from mtp_mlx.server.service import Defaults, Service

LEVELS = ("debug", "info", "warning", "error")
_CLOSING = 5.0  # seconds for the engine to end


def command(
    model: Model = DEMO,
    drafter: Drafter = "auto",
    adapter: Adapter = None,
    host: Annotated[str, typer.Option(help="Address to listen on; another than this machine's own needs a key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any free one.")] = 8080,
    api_key: Annotated[
        str | None, typer.Option(help="Key that clients must send. Others see it among the processes: prefer a file.")
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="File that holds the key.")] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Another name by which clients call this machine; once for each.")
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(help="Origin of web pages that may ask, such as https://example.org; once for each."),
    ] = None,
    name: Annotated[
        list[str] | None, typer.Option(help="Another name of the model for clients; once for each.")
    ] = None,
    ctx: Annotated[int | None, typer.Option(min=2, help="Context in tokens; default: the model's.")] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-m", help="Tokens of an answer where a request names none; -1: the context.")
    ] = -1,
    depth: Annotated[
        str, typer.Option(help="Tokens to draft per round; 'auto' measures, 0 is plain decoding.")
    ] = "auto",
    temp: Annotated[float, typer.Option(help="Temperature where a request names none.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Top-p where a request names none; 1 is off.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Min-p where a request names none; 0 is off.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Top-k where a request names none; 0 is off.")] = 0,
    thinking: Annotated[
        bool | None, typer.Option(help="Whether to reason where a request does not say; default: as the model does.")
    ] = None,
    parallel: Annotated[int, typer.Option(min=1, max=64, help="Requests that are worked on in turn.")] = SLOTS,
    prompt_cache: PromptCache = "auto",
    prompt_cache_dir: Annotated[
        Path | None,
        typer.Option(help="Folder in which what was read is kept for the time after a restart; unencrypted."),
    ] = None,
    prompt_cache_disk: Annotated[
        str, typer.Option(help="What that folder may take, such as 4GB; 'auto' is 10GB.")
    ] = "auto",
    dtype: Dtype = "auto",
    drafter_bits: DrafterBits = "auto",
    kv_bits: KvBits = "none",
    log_level: Annotated[str, typer.Option(help="What to report: debug, info, warning or error.")] = "info",
) -> None:
    """Serve a model over HTTP until Ctrl-C. Answers are those of `generate`, and several clients may ask at a time.

    Example: mtp-mlx serve --model google/gemma-4-E4B-it --port 8080
    """
    defaults = Defaults(max_tokens, temp, top_p, top_k, min_p, parse_depth(depth), thinking)
    _check(defaults, log_level)
    cached = Cached(prompt_cache, prompt_cache_dir, prompt_cache_disk)
    key = choose_key(host, _read_key(api_key, api_key_file))
    access = Access.of(host, (*(allow_host or ()), socket.gethostname()), tuple(allow_origin or ()), key)
    with Notes(log_level == "debug") as notes, listen(host, port) as bound:
        loaded = Parts(model, drafter, dtype, drafter_bits, kv_bits, adapter).load()
        notes.show()
        _report(log_level)
        engine = Engine(loaded.pair, loaded.tokenizer, cached.open(loaded), slots=parallel)
        service = Service.of(loaded, engine, slots=parallel, names=tuple(name or ()), context=ctx, defaults=defaults)
        threading.Thread(target=service.prepare, daemon=True).start()
        bound.listen()  # who comes at once is answered as soon as the application is made
        _announce(loaded, service, bound, key if key and not (api_key or api_key_file) else None)
        _run(service, access, bound)


def choose_key(host: str, given: str | None) -> str | None:
    """The key that clients have to send: the given one, or a new one where others can reach the server."""
    if given is not None or host.lower() in LOOPBACK:
        return given
    return secrets.token_urlsafe(24)


def _check(defaults: Defaults, log_level: str) -> None:
    if log_level not in LEVELS:
        raise RequestError(f"--log-level {log_level} is not one of {', '.join(LEVELS)}")
    if defaults.max_tokens == 0 or defaults.max_tokens < -1:
        raise RequestError(f"--max-tokens {defaults.max_tokens} is neither -1 nor at least 1")
    choose_sampler(defaults.temperature, defaults.top_p, defaults.min_p, defaults.top_k)


def _read_key(key: str | None, file: Path | None) -> str | None:
    if key is not None and file is not None:
        raise RequestError("--api-key and --api-key-file are both given; leave one out")
    if file is not None:
        try:
            key = file.read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"--api-key-file {file} cannot be read: {error}") from None
    if key is not None and not key.strip():
        raise RequestError("the API key is empty; give one, or leave it out")
    return key


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
