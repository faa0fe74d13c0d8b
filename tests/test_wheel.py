"""What is built and shipped works away from the checkout, demo weights included."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_wheel_runs_the_demo_from_another_folder(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("mtp_mlx-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names)) and "mtp_mlx/demo/assistant/model.safetensors" in names
    assert "mtp_mlx/demo_qwen/model.safetensors" in names
    assert {"mtp_mlx/pairs.toml", "mtp_mlx/chips.toml"} <= set(names)
    assert "mtp_mlx/server/page.html" in names
    assert {"mtp_mlx/server/app.py", "mtp_mlx/server/page.html"} <= set(names)
    assert "mtp_mlx/models/gemma4.py" in names and "mtp_mlx/py.typed" in names

    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    program = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "import mtp_mlx, mtp_mlx.cli.main\n"
        f"assert mtp_mlx.__file__.startswith({str(site)!r}), mtp_mlx.__file__\n"
        "for demo in ('demo', 'demo-qwen'):\n"
        "    print(mtp_mlx.generate(*mtp_mlx.load(demo), 'import ', max_tokens=8, depth=2))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
