"""What the server adds to `generate`, how long a short request waits behind a long one, what a next turn costs.

    python bench/serve.py [--model demo] [--prompts 6] [--tokens 256] [--repeats 5] [--parts speed waiting turns]

`speed`: the same texts by `stream_generate` in this process and from a server, in turns; seconds from the request to
the last token, without prompt cache. `waiting`: the first token of a short request while a prompt of 8,000 tokens is
read, against the same alone; one slice is 512 tokens of the long prompt, on average. `turns`: a conversation of 4,000
tokens and its next turns, from a server with a prompt cache and from one without. The last two run a demo whose context
was lengthened, which changes no time.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import report
from mlx_lm.tokenizer_utils import TokenizerWrapper
from serving import Server, events, serving, stretched

import mtp_mlx
from mtp_mlx.engine import CHUNK
from mtp_mlx.generation import encode
from mtp_mlx.types import Pair

LONG, TALK, CONTEXT = 8000, 4000, 16384
DEPTHS: tuple[int | str, ...] = (0, 4, "auto")


async def stream(client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[list[str], float, float, dict[str, Any]]:
    """The pieces of a completion, seconds to the first and to the last, and its last event but one."""
    began, first, pieces, last = time.perf_counter(), 0.0, list[str](), dict[str, Any]()
    async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        assert response.status_code == 200, await response.aread()
        async for event in events(response):
            first = first or time.perf_counter() - began
            pieces += [choice["text"] for choice in event["choices"]]
            last = event
    return pieces, first, time.perf_counter() - began, last


async def speed(
    server: Server, pair: Pair, tokenizer: TokenizerWrapper, options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    texts = [entry["text"] for entry in report.prompts(report.HELDOUT, options.prompts)]
    found: dict[str, dict[str, Any]] = {}
    async with httpx.AsyncClient(base_url=server.base, timeout=600) as client:
        for depth in DEPTHS:
            ratios: list[float] = []
            for repeat in range(options.repeats + 1):
                mine = theirs = 0.0
                for text in texts:
                    body = {"prompt": text, "max_tokens": options.tokens, "temperature": 0, "depth": depth}
                    began = time.perf_counter()
                    run = mtp_mlx.stream_generate(pair, tokenizer, text, options.tokens, depth=depth)
                    written = "".join([response.text for response in run])
                    mine += time.perf_counter() - began
                    pieces, _, seconds, _ = await stream(client, body)
                    theirs += seconds
                    assert "".join(pieces) == written, "the server writes another text"
                if repeat:  # the first one compiles
                    ratios.append(mine / theirs)
            found[str(depth)] = {"server_over_generate": statistics.median(ratios), "repeats": sorted(ratios)}
    return found


async def waiting(server: Server, tokenizer: TokenizerWrapper, repeats: int) -> dict[str, Any]:
    long = {"prompt": _tokens(tokenizer, LONG), "max_tokens": 1, "temperature": 0}
    short = {"prompt": "def f(x):", "max_tokens": 8, "temperature": 0}
    alone, behind = list[float](), list[float]()
    async with httpx.AsyncClient(base_url=server.base, timeout=600) as client:
        await stream(client, short)  # the first one compiles
        _, whole, _, _ = await stream(client, long)
        for repeat in range(repeats):
            _, quick, _, _ = await stream(client, short)
            running = asyncio.create_task(stream(client, long))
            await asyncio.sleep(whole * (0.2 + 0.5 * repeat / repeats))
            _, late, _, _ = await stream(client, short)
            assert not running.done(), "the long prompt was read before the short one was answered"
            await running
            alone.append(quick)
            behind.append(late)
    slice_seconds = whole / (LONG / CHUNK)
    waits = [(late - quick) / slice_seconds for late, quick in zip(behind, alone, strict=True)]
    return {
        "slice_s": slice_seconds,
        "first_token_alone_s": statistics.median(alone),
        "first_token_behind_s": statistics.median(behind),
        "waited_slices": {"median": statistics.median(waits), "max": max(waits)},
    }


async def turns(warm: Server, cold: Server, tokenizer: TokenizerWrapper) -> dict[str, Any]:
    system = tokenizer.decode(_tokens(tokenizer, TALK - 300))
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "def first(items):"}]
    found = []
    async with (
        httpx.AsyncClient(base_url=warm.base, timeout=600) as client,
        httpx.AsyncClient(base_url=cold.base, timeout=600) as other,
    ):
        for question in ("def second(items):", "def third(items):", None):
            body = {"messages": messages, "max_tokens": 100, "temperature": 0}
            began = time.perf_counter()
            answer = (await client.post("/v1/chat/completions", json=body)).json()
            seconds = time.perf_counter() - began
            began = time.perf_counter()
            again = (await other.post("/v1/chat/completions", json=body)).json()
            usage = answer["usage"]
            text = answer["choices"][0]["message"]["content"]
            found.append(
                {
                    "prompt": usage["prompt_tokens"],
                    "read": usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"],
                    "first_token_s": answer["timings"]["prompt_ms"] / 1e3,
                    "first_token_cold_s": again["timings"]["prompt_ms"] / 1e3,
                    "seconds": seconds,
                    "seconds_cold": time.perf_counter() - began,
                    "same_text": text == again["choices"][0]["message"]["content"],
                    "generated": usage["completion_tokens"],
                }
            )
            messages = [*messages, {"role": "assistant", "content": text}, {"role": "user", "content": question}]
    return {"turns": found}


def _tokens(tokenizer: TokenizerWrapper, count: int) -> list[int]:
    text = "\n\n".join(entry["text"] for entry in report.prompts(report.HELDOUT, None))
    ids = encode(tokenizer, text, special=False)
    return (ids * (count // len(ids) + 1))[:count]


async def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    loaded, tokenizer = mtp_mlx.load(options.model)
    pair = loaded.pair
    figures: dict[str, Any] = {"model": options.model, "tokens": options.tokens, "prompts": options.prompts}
    if "speed" in options.parts:
        with serving(options.model, "--prompt-cache", "0") as server:
            figures["speed"] = await speed(server, pair, tokenizer, options)
    long = stretched(options.model, folder, CONTEXT)
    with serving(long, "--prompt-cache", "0") as cold, serving(long, "--prompt-cache", "1GB") as warm:
        if "turns" in options.parts:
            figures |= await turns(warm, cold, tokenizer)
        if "waiting" in options.parts:
            figures["waiting"] = await waiting(cold, tokenizer, options.repeats)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", choices=("demo", "demo-qwen"))
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--parts", nargs="+", default=["speed", "waiting", "turns"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report.write(asyncio.run(measure(options, Path(folder))), options.out)


if __name__ == "__main__":
    main()
