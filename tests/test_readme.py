"""The README's Python examples run as they stand."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


def _examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("example", _examples(), ids=lambda example: example.splitlines()[0])
def test_an_example_runs(example: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(example, str(README), "exec"), {})
    assert capsys.readouterr().out.strip()


def test_the_first_screen_has_the_two_commands() -> None:
    first_screen = README.read_text().splitlines()[:30]
    assert sum(line.startswith("python3 -m venv .venv && ") for line in first_screen) == 2
    assert any("mtp-mlx generate" in line and "--show-drafts" in line for line in first_screen)
    assert any(line.endswith(".venv/bin/pytest -n auto") for line in first_screen)


def test_every_option_named_in_the_readme_exists() -> None:
    source = "".join(file.read_text() for file in (README.parent / "cli").glob("*.py")).replace("_", "-")
    for option in set(re.findall(r"--[a-z][a-z-]+", README.read_text())):
        assert re.sub("^--(no-)?", "", option) in source, option
