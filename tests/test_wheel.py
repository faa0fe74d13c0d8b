"""What is built and shipped works away from the checkout, demo weights included, where there is no compiler."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
PROGRAM = """
import shutil, sys
import mtp_mlx, mtp_mlx.cli.main
assert mtp_mlx.__file__.startswith({site!r}), mtp_mlx.__file__
assert not shutil.which("g++") and not shutil.which("cc")
print(mtp_mlx.generate(*mtp_mlx.load("demo-qwen"), "import ", max_tokens=8, depth=2))
sys.argv = ["mtp-mlx", "generate", "import ", "--model", "demo", "-m", "8", "--depth", "2", "--no-stats"]
mtp_mlx.cli.main.main()
"""


def _sdist(folder: Path) -> Path:
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.glob("mtp_mlx-*.tar.gz")
    return built


def test_a_wheel_of_the_source_archive_runs_the_demos_from_another_folder(tmp_path: Path) -> None:
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(_sdist(tmp_path))]
    subprocess.run([*PIP, *build], check=True)
    (wheel,) = tmp_path.glob("mtp_mlx-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names)) and "mtp_mlx/demo/assistant/model.safetensors" in names
    assert "mtp_mlx/demo_qwen/model.safetensors" in names
    assert {"mtp_mlx/pairs.toml", "mtp_mlx/chips.toml"} <= set(names)
    assert {"mtp_mlx/server/app.py", "mtp_mlx/server/page.html"} <= set(names)
    assert "mtp_mlx/models/gemma4.py" in names and "mtp_mlx/py.typed" in names

    site = tmp_path / "site"
    subprocess.run([*PIP, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(site=str(site))],
        cwd=tmp_path,
        env={**os.environ, "PATH": str(site / "bin"), "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip()) > 16 and "Traceback" not in done.stderr
