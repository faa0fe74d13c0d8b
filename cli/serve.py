"""`mtp-mlx serve`: a model behind OpenAI's and llama.cpp's HTTP interfaces."""

from pathlib import Path
from typing import Annotated

import typer

from mtp_mlx.cli.options import (
    Adapter,
    Cached,
    Depth,
    Drafter,
    DrafterBits,
    Dtype,
    KvBits,
    Model,
    Parts,
    PromptCache,
    parse_depth,
)
from mtp_mlx.engine import SLOTS
from mtp_mlx.hub import DEMO


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
    depth: Depth = "auto",
    temp: Annotated[float, typer.Option(help="Temperature where a request names none.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Top-p where a request names none; 1 is off.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Min-p where a request names none; 0 is off.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Top-k where a request names none; 0 is off.")] = 0,
    think: Annotated[
        bool | None,
        typer.Option(
            "--think/--no-think", help="Whether to reason where a request does not say; default: as the model does."
        ),
    ] = None,
    parallel: Annotated[int, typer.Option(min=1, max=64, help="Requests that are worked on at a time.")] = SLOTS,
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
    # Web frameworks take half a second to be imported, which the other commands shall not wait for.
    from mtp_mlx.cli.serving import Door, serve
    from mtp_mlx.server.service import Defaults

    door = Door(host, port, tuple(allow_host or ()), tuple(allow_origin or ()), api_key, api_key_file)
    defaults = Defaults(max_tokens, temp, top_p, top_k, min_p, parse_depth(depth), think)
    parts = Parts(model, drafter, dtype, drafter_bits, kv_bits, adapter)
    cached = Cached.parse(prompt_cache, prompt_cache_dir, prompt_cache_disk)
    serve(parts, cached, door, defaults, tuple(name or ()), ctx, parallel, log_level)
