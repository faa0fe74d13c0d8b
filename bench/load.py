"""Several clients at a time for many minutes, some of which leave, read slowly or talk nonsense: is every answer right?

Starts `mtp-mlx serve`, asks each question once alone, then lets clients ask at random and compares every whole answer
with that one. Reports answers, faults, what the server's memory did and how its queue refused.

    python bench/load.py --model demo --minutes 10 --clients 4
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from report import machine
from serving import events, serving

WARM_UP = 0.25  # of the time; memory is compared from then on
SLOW = 0.05  # seconds between a slow reader's reads

QUESTIONS = [
    "def fibonacci(n):",
    "class Stack:\n    def push(self, item):",
    "import os\n\n\ndef walk(folder):\n    for name in os.listdir(folder):",
    "def test_push(self):\n    stack = Stack()\n",
    "for i in range(10):\n    print(",
    "try:\n    value = int(text)\nexcept ",
    "with open(path) as file:\n    for line in file:\n",
    "def parse(line: str) -> dict[str, str]:\n",
]

NONSENSE: list[bytes] = [
    b"",
    b"{",
    b"[1, 2",
    b"\xff\xfe",
    b"null",
    b'{"prompt": 5, "max_tokens": 3}',
    b'{"prompt": "a", "max_tokens": -7}',
    b'{"prompt": "a", "temperature": "hot"}',
    b'{"prompt": "a", "unheard_of": 1}',
    b'{"prompt": [99999999], "max_tokens": 3}',
    b"[" * 5000,
]


@dataclass
class Findings:
    """What came of it."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)  # seconds to the first token
    resident: list[tuple[float, int]] = field(default_factory=list)  # seconds since the start, bytes


def question(number: int, long: int) -> dict[str, Any]:
    """One of the questions, behind as much other text as makes `long` of them long prompts."""
    text = QUESTIONS[number % len(QUESTIONS)]
    if number < long:
        text = "\n".join(QUESTIONS[(number + i) % len(QUESTIONS)] + f"\n    # {number} {i}" for i in range(60)) + text
    return {"prompt": text, "max_tokens": 48, "temperature": 0}


async def ask(
    client: httpx.AsyncClient, body: dict[str, Any], findings: Findings, pause: float = 0, leave: int = 0
) -> str:
    """The text of an answer, read as a stream; what has come if `leave` events are all that is wanted."""
    began, text, seen = time.monotonic(), "", 0
    async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        if response.status_code == 429:
            await response.aread()
            raise asyncio.QueueFull
        if response.status_code != 200:
            raise AssertionError(f"{response.status_code}: {(await response.aread())[:200]!r}")
        async for event in events(response):
            if not seen:
                findings.first.append(time.monotonic() - began)
            seen += 1
            text += "".join(choice["text"] for choice in event["choices"])
            if leave and seen >= leave:
                return text
            if pause:
                await asyncio.sleep(pause)
    return text


async def one(
    client: httpx.AsyncClient, chance: random.Random, expected: list[str], long: int, found: Findings
) -> None:
    """One thing that a client may do."""
    number = chance.randrange(len(expected))
    body = question(number, long)
    match chance.choice(["stream", "stream", "whole", "leave", "slow", "nonsense", "drop"]):
        case "stream":
            compare(await ask(client, body, found), expected[number], found, "stream")
        case "slow":
            compare(await ask(client, body, found, pause=SLOW), expected[number], found, "slow")
        case "whole":
            response = await client.post("/v1/completions", json=body)
            if response.status_code == 429:
                raise asyncio.QueueFull
            compare(response.json()["choices"][0]["text"], expected[number], found, "whole")
        case "leave":
            begun = await ask(client, body, found, leave=chance.randint(1, 6))
            compare(begun, expected[number][: len(begun)], found, "leave")
        case "drop":
            with suppress(httpx.TimeoutException):
                await client.post("/v1/completions", json=body, timeout=chance.uniform(0.01, 0.3))
            found.counts["drop"] += 1
        case "nonsense":
            response = await client.post(
                "/v1/completions", content=chance.choice(NONSENSE), headers={"Content-Type": "application/json"}
            )
            if not 400 <= response.status_code < 500:
                found.faults.append(f"nonsense was answered with {response.status_code}: {response.text[:200]}")
            found.counts["nonsense"] += 1


def compare(text: str, expected: str, found: Findings, kind: str) -> None:
    found.counts[kind] += 1
    if text != expected:
        found.faults.append(f"{kind}: {text!r} in place of {expected!r}")


async def client_of(base: str, seed: int, until: float, expected: list[str], long: int, found: Findings) -> None:
    chance = random.Random(seed)
    async with httpx.AsyncClient(base_url=base, timeout=300) as client:
        while time.monotonic() < until:
            try:
                await one(client, chance, expected, long, found)
            except asyncio.QueueFull:
                found.counts["refused as busy"] += 1
                await asyncio.sleep(0.2)
            except (AssertionError, httpx.HTTPError, KeyError, ValueError) as error:
                found.faults.append(f"{type(error).__name__}: {error}")


async def watch(pid: int, began: float, until: float, found: Findings) -> None:
    """Notes the server's resident memory."""
    while time.monotonic() < until:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        found.resident.append((time.monotonic() - began, pages * os.sysconf("SC_PAGE_SIZE")))
        await asyncio.sleep(1)


async def load(base: str, pid: int, options: argparse.Namespace) -> tuple[Findings, list[str]]:
    found = Findings()
    async with httpx.AsyncClient(base_url=base, timeout=300) as client:
        expected = [await ask(client, question(i, options.long), found) for i in range(len(QUESTIONS))]
    began = time.monotonic()
    until = began + 60 * options.minutes
    clients = [client_of(base, i, until, expected, options.long, found) for i in range(options.clients)]
    await asyncio.gather(watch(pid, began, until, found), *clients)
    async with httpx.AsyncClient(base_url=base, timeout=300) as client:
        for _ in range(50):  # whoever left is noticed within a slice
            health = (await client.get("/health")).json()
            if not health["live"] and not health["waiting"]:
                break
            await asyncio.sleep(0.1)
        else:
            found.faults.append(f"requests are left behind: {health}")
        again = [await ask(client, question(i, options.long), found) for i in range(len(QUESTIONS))]
    if again != expected:
        found.faults.append("afterwards a question that is asked alone has another answer")
    return found, expected


def growth(resident: list[tuple[float, int]]) -> float:
    """By how much memory grew after the warm-up: the last tenth of the time against the first tenth after it."""
    end = resident[-1][0]
    early = [size for at, size in resident if WARM_UP * end <= at < (WARM_UP + 0.1) * end]
    late = [size for at, size in resident if at >= 0.9 * end]
    return statistics.median(late) / statistics.median(early) - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--long", type=int, default=2, help="how many of the questions have long prompts")
    parser.add_argument("--prompt-cache", default="64MB")
    options = parser.parse_args()
    with serving(options.model, "--prompt-cache", options.prompt_cache) as server:
        found, expected = asyncio.run(load(server.base, server.process.pid, options))
        alive = server.process.poll() is None
    code = server.process.returncode
    found.faults += [] if alive else ["the server died"]
    found.faults += [] if code == 0 else [f"the server ended with {code}"]
    report = {
        "machine": machine(),
        "model": options.model,
        "minutes": options.minutes,
        "clients": options.clients,
        "answers": dict(found.counts),
        "different_answers": len(set(expected)),
        "faults": found.faults[:20],
        "fault_count": len(found.faults),
        "first_token_s": {"median": statistics.median(found.first), "max": max(found.first)},
        "resident_mb": [round(found.resident[0][1] / 1e6), round(found.resident[-1][1] / 1e6)],
        "growth_after_warm_up": growth(found.resident),
    }
    print(json.dumps(report, indent=2))
    sys.exit(bool(found.faults))


if __name__ == "__main__":
    main()
