"""What every benchmark writes beside its figures: machine, versions, commit."""

import json
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx


def machine() -> dict[str, Any]:
    """Name of the processor and device, versions of what was measured, and the commit."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": _processor(),
        "device": str(mx.default_device()),
        "os": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("mtp-mlx", "mlx", "mlx-lm")},
        "commit": commit.stdout.strip() or None,
    }


def _processor() -> str:
    cpu = Path("/proc/cpuinfo")
    if cpu.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")
        ]
        return f"{len(names)} x {names[0]}" if names else platform.machine()
    return str(mx.device_info().get("device_name", platform.processor()))


def write(figures: dict[str, Any], path: Path | None) -> None:
    """One JSON object to a file, or to standard output."""
    text = json.dumps({"machine": machine(), **figures}, indent=1)
    if path is None:
        sys.stdout.write(text + "\n")
    else:
        path.write_text(text + "\n")
