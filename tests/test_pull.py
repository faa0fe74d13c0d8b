"""`mtp-mlx pull` and the program against a hub: downloads, pairs, interruptions and errors as a user meets them."""

import json
import signal
import subprocess
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
from conftest import program
from huggingface_hub import constants
from loopback import FIXTURES, Loopback

from mtp_mlx.cli import display

PROGRAM = str(Path(sys.executable).parent / "mtp-mlx")
DENSE = "google/gemma-4-31B-it"
QWEN = "Qwen/Qwen3.6-27B"


def shell(*arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    done = program(*arguments)
    return done.returncode, done.stdout, done.stderr


def run(hub: Loopback, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = [PROGRAM, *arguments]
    environment = hub.environment | more
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)


def test_a_model_is_downloaded_paired_run_and_run_again_offline(hub: Loopback) -> None:
    command = ("generate", "def f(", "--model", DENSE, "-m", "20", "--json")
    hub.fail(DENSE, "model.safetensors", after=1000)  # taken up again, and not worth a word
    first = run(hub, *command)
    assert (first.returncode, first.stderr) == (0, "")
    answer = json.loads(first.stdout)
    assert (answer["model"], answer["drafter"]) == (DENSE, f"{DENSE}-assistant")
    asked = len(hub.log)
    again = run(hub, *command, HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["tokens"] == answer["tokens"] and len(hub.log) == asked


def test_ctrl_c_ends_a_download_at_once_and_the_next_one_goes_on(hub: Loopback) -> None:
    repo, shard = "google/gemma-4-26B-A4B-it", "model-00002-of-00003.safetensors"
    hub.fail(repo, shard, wait=30)
    download = subprocess.Popen(
        [PROGRAM, "pull", repo], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=hub.environment
    )
    while not hub.waiting:
        assert download.poll() is None, download.communicate()[1]
        time.sleep(0.02)
    download.send_signal(signal.SIGINT)
    _, said = download.communicate(timeout=10)
    assert download.returncode == 130
    assert said.splitlines() == [f"interrupted; `mtp-mlx pull {repo}` goes on with the files that are missing"]
    first = hub.sent(repo)
    assert run(hub, "pull", repo).returncode == 0
    assert hub.sent(repo) - first == sum(
        len(hub.repositories[repo].files[s]) for s in (shard, shard.replace("2", "3", 1))
    )


def test_a_download_with_its_bars_is_over_before_the_spinner(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def spin(text: str) -> AbstractContextManager[None]:
        order.append(text)
        return nullcontext()

    monkeypatch.setattr(display, "fetch", lambda model, drafter: order.append(f"fetch {model} and {drafter}"))
    monkeypatch.setattr(display._stderr, "status", spin)
    with display.loading("a/b", "auto"):
        order.append("load")
    assert order == ["fetch a/b and auto", "loading a/b", "load"]


def test_pull_says_what_came(hub: Loopback) -> None:
    code, out, _ = shell("pull", DENSE)
    target, drafter, reason = out.splitlines()
    size = sum(len(content) for content in hub.repositories[DENSE].files.values())
    assert code == 0
    assert target.startswith(f"model {DENSE}: 6 files, {size / 1e6:.1f} MB fetched, {size / 1e6:.1f} MB in {hub.home}")
    assert drafter.startswith(f"drafter {DENSE}-assistant: 2 files") and reason.startswith("drafter: published for")
    code, out, _ = shell("pull", DENSE)
    assert code == 0 and all("already here" in line for line in out.splitlines()[:2])
    code, out, _ = shell("pull", DENSE, "--json")
    assert code == 0 and [part["fetched"] for part in json.loads(out)["parts"]] == [0, 0]


def test_pull_takes_the_drafter_it_is_told(hub: Loopback) -> None:
    hub.add("me/drafter", FIXTURES / "gemma4_keqv" / "assistant_ordered")
    assert shell("pull", DENSE, "--drafter", "none")[1].count("files") == 1
    assert "drafter me/drafter: 2 files" in shell("pull", DENSE, "--drafter", "me/drafter")[1]
    assert "model me/drafter: already here" in shell("pull", "me/drafter")[1]
    assert "on this machine, nothing to fetch" in shell("pull", QWEN)[1].splitlines()[1]  # a head inside
    assert shell("pull", "demo")[0] == 0


def test_pull_offline_is_content_with_what_is_complete(hub: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    shell("pull", QWEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, out, err = shell("pull", QWEN)
    assert code == 0 and "already here" in out and "what is here of Qwen/Qwen3.6-27B is complete" in err
    code, out, err = shell("pull", DENSE)
    assert (code, out, err.count("\n")) == (1, "", 1) and "HF_HUB_OFFLINE" in err


def test_errors_are_one_line_and_an_exit_code(hub: Loopback) -> None:
    hub.repositories[f"{DENSE}-assistant"].gated = True
    code, out, err = shell("pull", DENSE)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert (
        f"{DENSE} is here, its drafter (published for google/gemma-4-31B-it) is not: {DENSE}-assistant is gated" in err
    )
    hub.add("a/llama", None, {"config.json": b'{"model_type": "llama"}', "model.safetensors": b""})
    for command in (
        ("pull", "a/llama"),
        ("generate", "x", "--model", "nobody/nothing"),
        ("pull", ""),
        ("pull", "demo", "--drafter", "nosuch"),
    ):
        code, out, err = shell(*command)
        assert (code, out, err.count("\n")) == (1, "", 1) and err.startswith("mtp-mlx: ")


def test_models_lists_what_can_be_run(hub: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = shell("models")
    assert code == 0 and "nothing that can be run" in out and "demo-qwen" in out
    shell("pull", DENSE)
    shell("pull", QWEN)
    hub.fail("google/gemma-4-26B-A4B-it", "model-00003-of-00003.safetensors", status=404)
    assert shell("pull", "google/gemma-4-26B-A4B-it")[0] == 1
    hub.add("a/llama", None, {"config.json": b'{"model_type": "llama"}', "model.safetensors": b""})
    shell("pull", "a/llama")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, out, _ = shell("models")
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert code == 0
    assert f"complete; drafter: {DENSE}-assistant (published for google/gemma-4-31B-it)" in lines[DENSE]
    assert lines[f"{DENSE}-assistant"].split()[1] == "drafter"
    assert "the mtp head inside the checkpoint" in lines[QWEN]
    assert "lacks model-00003-of-00003.safetensors; mtp-mlx pull google/" in lines["google/gemma-4-26B-A4B-it"]
    assert "a/llama" not in lines and "demo" in lines
    listed = json.loads(shell("models", "--all", "--json")[1])
    complete = {model["name"]: model["complete"] for model in listed["models"]}
    assert complete == {DENSE: True, f"{DENSE}-assistant": True, QWEN: True, "google/gemma-4-26B-A4B-it": False}
    assert listed["demos"] == ["demo", "demo-qwen"] and "pairs" in listed
