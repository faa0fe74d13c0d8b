"""`mtp-mlx serve`: what it prints, what it refuses, and that a signal ends it."""

import json
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from conftest import FIXTURES, program

from mtp_mlx.cli.options import DISK, Cached
from mtp_mlx.cli.serving import Door
from mtp_mlx.loading import load_pair
from mtp_mlx.server.run import listen

MODEL = str(FIXTURES / "gemma4_keqv")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--log-level", "loud"], "--log-level loud is not one of debug, info, warning, error"),
        (["--prompt-cache", "much"], "--prompt-cache much"),
        (["--prompt-cache-dir", "x", "--prompt-cache-disk", "-4"], "--prompt-cache-disk -4"),
        (["--prompt-cache-disk", "4GB"], "--prompt-cache-dir, which is not given"),
        (["--max-tokens", "0"], "--max-tokens 0"),
        (["--depth", "deep"], "--depth deep"),
        (["--temp", "-1"], "temperature"),
        (["--api-key", " "], "the API key is empty"),
        (["--api-key", "x", "--api-key-file", "y"], "leave one out"),
        (["--api-key-file", "/no/such/file"], "cannot be read"),
        (["--host", "no.such.host.invalid"], "no address of this machine"),
        (["--think"], "no switch for thinking"),
    ],
)
def test_bad_options_are_one_line(arguments: list[str], message: str) -> None:
    done = program("serve", "--model", MODEL, "--port", "0", *arguments)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("mtp-mlx: ") and message in done.stderr and done.stderr.count("\n") == 1


def test_a_port_in_use_is_refused_before_anything_is_loaded() -> None:
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        port = str(taken.getsockname()[1])
        done = program("serve", "--model", "no/such-model", "--port", port)
    assert done.returncode == 1 and f"port {port} of 127.0.0.1 is taken" in done.stderr


def test_others_need_a_key() -> None:
    assert Door("127.0.0.1", 0).choose_key() == Door("localhost", 0).choose_key() == (None, False)
    assert Door("127.0.0.1", 0, key="k").choose_key() == Door("0.0.0.0", 0, key="k").choose_key() == ("k", False)
    made, new = Door("0.0.0.0", 0).choose_key()
    assert made is not None and len(made) > 20 and new and (made, new) != Door("192.168.1.5", 0).choose_key()


def test_other_commands_do_not_wait_for_web_frameworks() -> None:
    code = "import sys, mtp_mlx.cli.main; sys.exit(any(name in sys.modules for name in ('fastapi', 'uvicorn')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_until_a_signal(number: signal.Signals, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("k3y\n")
    arguments = ["serve", "--model", MODEL, "--port", "0", "--api-key-file", str(key), "--name", "tiny"]
    arguments += ["--prompt-cache-dir", str(tmp_path / "kept"), "--prompt-cache-disk", "1MB"]
    code = "import sys; from mtp_mlx.cli.main import main; sys.argv[0] = 'mtp-mlx'; main()"
    with subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE, text=True) as served:
        try:
            said = _asked(served)
            served.send_signal(number)
            _, rest = served.communicate(timeout=30)
        finally:
            served.kill()
    assert any(told.startswith("model: tiny, context 1024") for told in said)
    assert any(told.startswith("drafter: ") and "lies in the target's folder" in told for told in said)
    assert "k3y" not in "".join(said)
    (pair,) = (tmp_path / "kept").iterdir()
    assert pair.is_dir() and pair.stat().st_mode & 0o777 == 0o700
    assert served.returncode == 0, rest
    assert "GET /v1/models 200 ok" in rest and "Traceback" not in rest


def _asked(served: "subprocess.Popen[str]") -> list[str]:
    """What a server says until it listens; it is then asked for its models."""
    assert served.stderr is not None
    said = []
    for told in served.stderr:
        said.append(told)
        if told.startswith("listening on "):
            break
    address = said[-1].split()[2]
    headers = {"authorization": "Bearer k3y", "content-type": "application/json"}
    for path, body in ("/v1/models", None), ("/v1/completions", b'{"prompt": "One two", "max_tokens": 4}'):
        asked = urllib.request.Request(address + path, body, headers)
        with urllib.request.urlopen(asked, timeout=20) as answer:
            assert json.load(answer)["object"] in ("list", "text_completion")
    return said


def test_the_prompt_cache_is_as_large_as_asked_for(tmp_path: Path) -> None:
    loaded = load_pair(MODEL)
    assert Cached.parse("2MB").open(loaded).budget == 2 * 10**6 and Cached.parse("0").open(loaded).budget == 0
    assert Cached.parse("auto").open(loaded).budget > 0
    assert Cached.parse("0", tmp_path).disk == DISK and Cached.parse("0", tmp_path, "3kB").disk == 3000
