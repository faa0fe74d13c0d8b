"""A server of its own for a benchmark, and how to read its streams."""

import json
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from mtp_mlx.hub import find

# Demos have no chat template; this one's turns end with a token that theirs end with.
TEMPLATE = (
    "{% for message in messages %}# {{ message.role }}\n{{ message.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}# assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Server:
    base: str
    process: subprocess.Popen[bytes]


@contextmanager
def serving(model: str, *options: str) -> Iterator[Server]:
    """`mtp-mlx serve` on a free port, from when it answers until the end of the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["mtp-mlx", "serve", "--model", model, "--port", str(port), "--log-level", "warning", *options]
    process = subprocess.Popen(command)
    base = f"http://127.0.0.1:{port}"
    try:
        _await(base, process)
        yield Server(base, process)
    finally:
        process.terminate()
        process.wait(30)


def _await(base: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        try:
            if httpx.get(f"{base}/health").status_code == 200:
                return
        except httpx.TransportError:
            if process.poll() is not None:
                raise SystemExit("the server did not start") from None
        time.sleep(0.1)
    raise SystemExit("the server does not answer")


async def events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """What a stream brings. Raises ValueError for an error in it, or where it does not end as it should."""
    async for line in response.aiter_lines():
        if line == "data: [DONE]":
            return
        if line.startswith("data: "):
            event: dict[str, Any] = json.loads(line[6:])
            if "error" in event:
                raise ValueError(f"in the stream: {event['error']}")
            yield event
    raise ValueError("the stream ended without [DONE]")


def stretched(model: str, folder: Path, context: int) -> str:
    """A copy of a demo with a longer context, for the time that it takes, and a chat template; the folder's name."""
    copy = folder / model
    shutil.copytree(find(model), copy)
    for path in copy.rglob("config.json"):
        config = json.loads(path.read_text())
        config.get("text_config", config)["max_position_embeddings"] = context
        path.write_text(json.dumps(config))
    (copy / "chat_template.jinja").write_text(TEMPLATE)
    return str(copy)
