"""The same checkpoint decoded by this package, by mlx-lm and by mlx-vlm's MTP, each in its own environment.

    python bench/against.py --mlx-vlm-python /path/to/other/venv/bin/python [--model demo] [--depth 3] [--tokens 256]
        [--repeats 7] [--dtype float32] [--full-acceptance] [--out figures.json]

Every engine is a process that stays alive; requests go to one after the other, A B C A B C, and are timed inside. The
texts are greedy, and each is compared with the one that this package writes at depth 0. Tokens per second are those
after an engine's first round. With --full-acceptance the last arms draft for nothing and are always right: this
package is handed the text's next tokens, and mlx-vlm's own loop a drafter that returns them. What a round costs then
is the engine alone. An OpenBLAS that is preloaded here is preloaded in all.
"""

import argparse
import json
import subprocess
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import report

from mtp_mlx import bench
from mtp_mlx.cli.options import DTYPES
from mtp_mlx.generation import encode
from mtp_mlx.hub import find
from mtp_mlx.loading import load_pair


class Worker:
    """An engine in its own process."""

    def __init__(self, python: str, engine: str, target: str, drafter: str, dtype: str):
        program = [python, str(Path(__file__).parent / "worker.py"), engine, target, drafter, dtype]
        self._process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.engine, self.versions = engine, self._read()

    def ask(self, request: dict[str, Any]) -> dict[str, list[Any]]:
        assert self._process.stdin is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return json.loads(line) if line else sys.exit(f"the process of {self._process.args} ended")


def main() -> None:
    options = _options()
    loaded = load_pair(options.model, options.drafter, DTYPES[options.dtype])
    where = (str(find(options.model)), loaded.drafter or "none", options.dtype)
    pythons = {"ours": options.ours_python, "mlx-lm": options.mlx_lm_python, "mlx-vlm": options.mlx_vlm_python}
    workers = {name: Worker(python, name, *where) for name, python in pythons.items() if python != "none"}
    room = loaded.pair.target.context - options.tokens
    entries = report.prompts(options.prompts, options.limit)
    prompts = [encode(loaded.tokenizer, entry["text"])[:room] for entry in entries]
    base = {"tokens": options.tokens, "stop": sorted(loaded.tokenizer.eos_token_ids)}
    results = bench.compare(_arms(workers, base, options), prompts, options.repeats, report.say)
    settings = {name: vars(options)[name] for name in ("model", "dtype", "depth", "tokens", "repeats")}
    figures = {
        "settings": settings | {"drafter": loaded.drafter, "prompts": len(prompts)},
        "versions": {name: worker.versions for name, worker in workers.items()},
        "arms": {name: _figures(result, results) for name, result in results.items()},
    }
    report.write(figures, options.out)


def _arms(workers: dict[str, Worker], base: dict[str, Any], options: argparse.Namespace) -> list[bench.Arm]:
    """Plain decoding by every engine, drafting by those that can, and drafting for nothing if that is asked for."""
    truths: dict[int, list[int]] = {}  # by prompt, as ours writes it at depth 0

    def arm(name: str, depth: int, knows: bool = False) -> bench.Arm:
        def write(prompt: list[int], seed: int) -> bench.Text:
            if seed not in truths:
                truths[seed] = workers["ours"].ask(base | {"prompt": prompt, "depth": 0, "truth": []})["tokens"]
            request = base | {"prompt": prompt, "depth": depth, "truth": truths[seed] if knows else []}
            return _text(workers[name].ask(request), depth)

        return bench.Arm(f"{name} depth {depth}" + " always right" * knows, write)

    drafting = [name for name in workers if name != "mlx-lm"]
    arms = [arm(name, 0) for name in workers] + [arm(name, options.depth) for name in drafting]
    return arms + [arm(name, options.depth, knows=True) for name in drafting if options.full_acceptance]


def _text(answer: dict[str, list[Any]], depth: int) -> bench.Text:
    tokens, numbers, seconds = answer["tokens"], answer["rounds"], answer["seconds"]
    sizes = [len(list(group)) for _, group in groupby(numbers)]
    opening, each = sizes[0], tuple((depth, size - 1) for size in sizes)
    spent = seconds[-1] - seconds[opening - 1]
    return bench.Text(tuple(tokens), len(tokens) - opening, spent, seconds[0], rounds=each)


def _figures(result: bench.Result, results: dict[str, bench.Result]) -> dict[str, Any]:
    seconds = sum(text.seconds for text in result.texts)
    return {
        "tokens_per_second": round(result.speed, 3),
        "repeats": [round(speed, 3) for speed in result.speeds],
        "ms_per_round": round(1e3 * seconds / result.rounds, 3) if result.rounds else None,
        "tokens_per_round": round(result.tokens_per_round, 3),
        "ttft_seconds": round(result.ttft_seconds, 4),
        "against_ours_depth_0": round(result.speed / results["ours depth 0"].speed, 3),
        "same_text_as_ours_depth_0": result.wrote_as(results["ours depth 0"]),
    }


def _options() -> argparse.Namespace:
    parser = report.parser(__doc__)
    parser.add_argument("--ours-python", default=sys.executable)
    parser.add_argument("--mlx-lm-python", default=sys.executable, help="or none")
    parser.add_argument("--mlx-vlm-python", default=sys.executable, help="or none")
    parser.add_argument("--prompts", type=Path, default=report.HELDOUT)
    parser.add_argument("--limit", type=int, default=4, help="so many prompts of the file, evenly spread")
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--full-acceptance", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
