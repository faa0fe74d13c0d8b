"""What every benchmark writes beside its figures: machine, versions, commit; and the options that many have."""

import argparse
import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mtp_mlx import bench
from mtp_mlx.cli.options import DTYPES

HELDOUT = Path(__file__).parent / "demo" / "heldout.json"


def parser(description: str | None, model: str = "demo") -> argparse.ArgumentParser:
    """A parser with the options that say what is loaded and where the figures go."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=model)
    parser.add_argument("--drafter", default="auto")
    parser.add_argument("--dtype", choices=DTYPES, default="auto")
    parser.add_argument("--out", type=Path)
    return parser


def prompts(path: Path, count: int | None) -> list[dict[str, str]]:
    """So many prompts of a file, evenly spread: a JSON list of objects with text, source and kind."""
    entries: list[dict[str, str]] = json.loads(path.read_text())
    wanted = min(count or len(entries), len(entries))
    return [entries[i * len(entries) // wanted] for i in range(wanted)]


def say(message: str) -> None:
    """Progress, beside the figures."""
    print(message, file=sys.stderr)


def write(figures: dict[str, Any], path: Path | None) -> None:
    """One JSON object to a file, or to standard output."""
    text = json.dumps({"machine": machine(), **figures}, indent=1)
    if path is None:
        sys.stdout.write(text + "\n")
    else:
        path.write_text(text + "\n")


def machine() -> dict[str, Any]:
    """The machine, the time, and the commit that was measured."""
    time = datetime.now(UTC).isoformat(timespec="seconds")
    return {"time": time, **bench.machine(), "commit": _git("rev-parse", "--short", "HEAD"), "changed": _changed()}


def _changed() -> bool:
    """Whether files that Git knows differ from that commit."""
    return bool(_git("status", "--porcelain", "--untracked-files=no"))


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip()
