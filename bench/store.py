"""What a prompt on disk is worth: reading it by the model against writing it, loading it and finding it in memory.

    python bench/store.py [--model demo] [--context 500 1000] [--repeats 3] [--folder DIR] [--out figures.json]

Seconds are the least of the repeats, the file cache of the system warm. A loaded prompt is checked in full and its
snapshot restored; `ratio` is the time of reading over that of loading. --folder is on the disk that is measured.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import report

from mtp_mlx.choosing import Rules
from mtp_mlx.cli.options import DTYPES
from mtp_mlx.loading import Loaded, load_pair
from mtp_mlx.prefixes import Prefixes
from mtp_mlx.store import Store, identity

PLENTY = 2**40
STEP = 512


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--context", type=int, nargs="+", default=[500, 1000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    loaded = load_pair(options.model, options.drafter, DTYPES[options.dtype])
    rows = [compare(loaded, context, options.repeats, options.folder) for context in options.context]
    report.write({"model": options.model, "rows": rows}, options.out)


def compare(loaded: Loaded, context: int, repeats: int, folder: Path | None) -> dict[str, Any]:
    prompt = [5 + i % 200 for i in range(context)]
    rows = [once(loaded, prompt, folder) for _ in range(repeats)]
    least = {name: min(row[name] for row in rows) for name in rows[0]}
    return {"context": context, **least, "ratio": least["read"] / least["load"]}


def once(loaded: Loaded, prompt: list[int], below: Path | None) -> dict[str, float]:
    """Seconds of each way to the same sequence, and the bytes on disk."""
    name = identity(loaded)
    with tempfile.TemporaryDirectory(dir=below) as scratch:
        prefixes = Prefixes(loaded.pair, PLENTY, store=Store.open(Path(scratch), name, PLENTY))
        read = timed(lambda: visit(prefixes, prompt))
        write = timed(lambda: prefixes.flush(PLENTY))
        nbytes = prefixes.usage.disk_nbytes
        prefixes.close()
        again = Prefixes(loaded.pair, PLENTY, store=Store.open(Path(scratch), name, PLENTY))
        load, found = (timed(lambda: visit(again, prompt)) for _ in range(2))
        assert again.usage.disk_hits == 1 and again.usage.hits == 2
        again.close()
    return {"read": read, "write": write, "load": load, "memory": found, "bytes": nbytes}


def visit(prefixes: Prefixes, prompt: list[int]) -> None:
    with prefixes.open(prompt, Rules()) as text:
        for _ in text.read(STEP):
            pass


def timed(action: Callable[[], object]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
