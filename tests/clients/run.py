"""Runs clients against a server on this machine and prints a table of what each of them does."""

import argparse
import logging
import shutil
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

# The doubles that the ordinary tests use lie one folder up.
sys.path.insert(0, str(Path(__file__).parent.parent))

from clients import editing, libraries, page
from clients.agents import AGENTS
from clients.report import Report
from clients.serving import FAMILIES, Family

Check = Callable[[Family], Report]
COLUMNS = ("client", "model", "version", "streams", "stops", "calls a tool", "continues", "remarks")


def main() -> int:
    """The exit code: 1 if anything failed."""
    asked = _arguments()
    logging.getLogger("mtp_mlx").setLevel(logging.ERROR)
    checks = _checks(asked.python, asked.pictures)
    unknown = set(asked.names) - checks.keys()
    if unknown:
        print(f"no client is called {', '.join(sorted(unknown))}; there are {', '.join(checks)}")
        return 2
    print(f"network: {'loopback only' if _is_offline() else 'not cut off'}", flush=True)
    rows, failed = [], False
    for name in asked.names or checks:
        for family in asked.family or FAMILIES:
            began = time.monotonic()
            row, text = _row(name, family, checks[name])
            print(f"{name} {family}: {text} ({time.monotonic() - began:.0f} s)", flush=True)
            rows.append(row)
            failed = failed or text.startswith("FAILED")
    print(_table(rows))
    return 1 if failed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="client; default: all")
    parser.add_argument("--family", choices=FAMILIES, action="append", help="whose markup to use; default: both")
    parser.add_argument("--python", default=sys.executable, help="interpreter that has the Python clients")
    parser.add_argument("--pictures", type=Path, help="folder for screenshots of the page")
    return parser.parse_args()


def _checks(python: str, pictures: Path | None) -> dict[str, Check | str]:
    """Each client's check, or how to install it."""
    checks: dict[str, Check | str] = {}
    for library in libraries.LIBRARIES:
        interpreter = libraries.find(library, python)
        checks[library.name] = libraries.checking(library, interpreter) if interpreter else library.install
    for agent in AGENTS:
        checks[agent.name] = editing.checking(agent) if shutil.which(agent.program) else agent.install
    browser = page.find_browser(python)
    checks["page"] = page.checking(python, browser, pictures) if browser else page.INSTALL
    return checks


def _row(name: str, family: Family, check: Check | str) -> tuple[tuple[str, ...], str]:
    if isinstance(check, str):
        return (name, family, "not installed", "", "", "", "", check), "not installed"
    try:
        report = check(family)
    except Exception as error:  # the others are to be run all the same
        told = traceback.format_exc(limit=-3)
        return (name, family, "FAILED", "", "", "", "", f"{error!r}".splitlines()[0][:100]), f"FAILED: {told}"
    return (name, family, *report), "ok"


def _table(rows: list[tuple[str, ...]]) -> str:
    lines = [COLUMNS, ("---",) * len(COLUMNS), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _is_offline() -> bool:
    return [name for _, name in socket.if_nameindex()] == ["lo"]


if __name__ == "__main__":
    sys.exit(main())
