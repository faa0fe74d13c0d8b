"""A server that is killed again and again while it reads, writes and keeps prompts on disk: are its answers right?

    python bench/kill.py [--model demo] [--kills 20] [--out figures.json]

Each time it is started on the same folder, asked questions with long prompts at random, and killed with SIGKILL at a
random moment: within an answer, or while it writes to disk. Every whole answer is compared with that of a server
without a prompt cache. `cached` counts tokens of first requests after a start, which only the disk can have brought.
"""

import random
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import report
from load import QUESTIONS, question
from serving import serving


def ask(client: httpx.Client, number: int) -> tuple[str, int]:
    """The answer to a question, and how many tokens of it had been read before."""
    answer = client.post("/v1/completions", json=question(number, len(QUESTIONS))).json()
    return answer["choices"][0]["text"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def expected(model: str) -> list[str]:
    with serving(model, "--prompt-cache", "0") as server, httpx.Client(base_url=server.base, timeout=300) as client:
        return [ask(client, number)[0] for number in range(len(QUESTIONS))]


def life(model: str, folder: str, right: list[str], chance: random.Random, found: dict[str, Any]) -> None:
    """One server's, from its start to its sudden end."""
    with serving(model, "--prompt-cache-dir", folder, "--log-level", "warning") as server:
        killer = threading.Timer(chance.uniform(0.5, 12.0), server.process.kill)
        killer.start()
        first = True
        try:
            with httpx.Client(base_url=server.base, timeout=300) as client:
                while server.process.poll() is None:
                    number = chance.randrange(len(QUESTIONS))
                    text, cached = ask(client, number)
                    found["answers"] += 1
                    found["cached"] += cached if first else 0
                    found["wrong"] += [] if text == right[number] else [f"{text!r} in place of {right[number]!r}"]
                    first = False
                    time.sleep(chance.choice([0.0, 0.0, 3.0]))  # it writes when nobody has come for a while
        except (httpx.HTTPError, KeyError):
            found["broken_off"] += 1
        killer.cancel()


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance, found = random.Random(options.seed), {"answers": 0, "broken_off": 0, "cached": 0, "wrong": list[str]()}
    right = expected(options.model)
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.kills):
            life(options.model, folder, right, chance, found)
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
    report.write({"model": options.model, "kills": options.kills, **found, "files_left": len(files)}, options.out)
    raise SystemExit(bool(found["wrong"]))


if __name__ == "__main__":
    main()
