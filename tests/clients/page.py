"""The server's own page in a browser: a model with a chat template, a demo without one, a server that wants a key."""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from clients.libraries import SAID, SCRIPTS, script
from clients.report import Report
from clients.serving import Family, scripted, unscripted

SECONDS = 300
INSTALL = "pip install playwright, and Chromium"
KEY = "a key"
PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def find_browser(python: str) -> str | None:
    """Chromium, where the interpreter can drive it."""
    done = subprocess.run([python, "-c", "import playwright"], capture_output=True, check=False)
    found = next(filter(None, map(shutil.which, PROGRAMS)), None)
    return found if done.returncode == 0 else None


def checking(python: str, browser: str, pictures: Path | None) -> Callable[[Family], Report]:
    """`pictures` is a folder for screenshots."""

    def check(family: Family) -> Report:
        demo = "demo-qwen" if family == "qwen" else "demo"
        with (
            tempfile.TemporaryDirectory() as folder,
            scripted(family, script) as chat,
            unscripted(demo) as raw,
            unscripted(demo, key=KEY) as keyed,
        ):
            urls = {"chat": chat.url, "raw": raw.url, "keyed": keyed.url}
            given = SAID | urls | {"key": KEY, "browser": browser, "pictures": str(pictures or folder)}
            done = subprocess.run(
                [python, str(SCRIPTS / "use_page.py"), json.dumps(given)],
                capture_output=True,
                text=True,
                timeout=SECONDS,
                check=False,
            )
            assert done.returncode == 0, done.stderr[-3000:]
        return Report(**json.loads(done.stdout.strip().splitlines()[-1]))

    return check
