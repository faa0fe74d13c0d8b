"""The program as a user meets it: a process, its streams and its exit code."""

import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import AS_BUILT, FIXTURES, needs_compiler, program
from loopback import Loopback

VARIANT = str(FIXTURES / "gemma4_keqv")
QWEN = str(FIXTURES / "qwen3_5_dense")
FIGURES = {
    "text", "tokens", "prompt_tokens",
    "cached_tokens", "prompt_tps", "generation_tokens", "generation_tps", "ttft_s",
    "finish_reason", "rounds", "tokens_per_round", "drafted", "accepted", "accepted_per_position",
    "copied", "copied_accepted", "compiled",
    "commit_ms", "draft_ms", "verify_ms", "host_ms", "depth", "depth_reason", "alarm", "memory", "model",
    "adapter", "machines", "drafter", "drafter_reason", "versions",
}  # fmt: skip


def run(*arguments: str, stdin: str | bytes = "", replay: bool = False) -> subprocess.CompletedProcess[str]:
    """The command; a process of its own is started only where a test is about replayed rounds."""
    given = stdin.encode() if isinstance(stdin, str) else stdin
    if not replay:
        return program(*arguments, stdin=given)
    command = [str(Path(sys.executable).parent / "mtp-mlx"), *arguments]
    done = subprocess.run(command, input=given, capture_output=True, timeout=120, check=False)
    return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(), done.stderr.decode())


def generate(*arguments: str, stdin: str | bytes = "") -> subprocess.CompletedProcess[str]:
    options = arguments if "--model" in arguments else ("--model", VARIANT, *arguments)
    return run("generate", *options, stdin=stdin)


def figures(*arguments: str, stdin: str = "") -> dict[str, object]:
    done = generate("--json", *arguments, stdin=stdin)
    assert done.returncode == 0, done.stderr
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


def test_text_goes_to_stdout_and_the_table_to_stderr() -> None:
    done = generate("def f(", "--max-tokens", "30", "--depth", "4")
    assert done.returncode == 0
    assert "\x1b" not in done.stdout and "tok/s" not in done.stdout
    for word in (
        "drafter",
        "prompt",
        "generated",
        "first token",
        "rounds",
        "per position",
        "draft",
        "verify",
        "host",
        "memory",
    ):
        assert word in done.stderr
    quiet = generate("def f(", "--max-tokens", "30", "--depth", "4", "--no-stats")
    assert quiet.stdout == done.stdout and quiet.stderr == ""


def test_json_is_one_object_with_every_figure() -> None:
    answer = figures("def f(", "--max-tokens", "30", "--depth", "3")
    assert answer.keys() == FIGURES
    assert answer["memory"].keys() == {"target", "drafter", "cache", "peak"}  # type: ignore[attr-defined]
    assert answer["versions"].keys() == {"mtp_mlx", "mlx", "mlx_lm", "python"}  # type: ignore[attr-defined]
    assert len(answer["tokens"]) == answer["generation_tokens"]  # type: ignore[arg-type]
    assert answer["drafter"] == f"{VARIANT}/assistant" and answer["model"] == VARIANT
    assert answer["depth"] == 3 and answer["depth_reason"] == "set by the caller"


def test_every_depth_writes_the_same_text() -> None:
    texts = {generate("for i in", "-m", "40", "--no-stats", "--depth", d).stdout for d in ("0", "1", "7", "auto")}
    assert len(texts) == 1
    warm = ("--temp", "0.8", "--top-p", "0.9", "--min-p", "0.01", "--top-k", "50", "--seed", "5")
    sampled = {generate("for i in", "-m", "40", "--no-stats", "--depth", d, *warm).stdout for d in ("0", "3")}
    assert len(sampled) == 1 and sampled != texts


@needs_compiler
def test_replayed_rounds_write_the_same_text() -> None:
    options = ("generate", "for i in", "--model", VARIANT, "-m", "30", "--depth", "2", "--json")
    built, replayed = (json.loads(run(*options, replay=replay).stdout) for replay in (False, True))
    assert built["tokens"] == replayed["tokens"]
    assert (built["compiled"], replayed["compiled"]) == (False, True)


def test_rules_of_sampling_are_the_same_at_every_depth() -> None:
    rules = ("--temp", "0.9", "--xtc-probability", "0.3", "--seed", "5", "--repetition-penalty", "1.3")
    more = ("--presence-penalty", "0.4", "--frequency-penalty", "0.2", "--logit-bias", "7=4", "--logit-bias", "9=-2")
    texts = [figures("for i in", "-m", "30", "--depth", depth, *rules, *more)["tokens"] for depth in ("0", "3")]
    assert texts[0] == texts[1]


def test_what_the_caller_predicts_is_copied(tmp_path: Path) -> None:
    text = generate("for i in", "-m", "40", "--no-stats", "--depth", "0").stdout
    (tmp_path / "text").write_text(text)
    found = figures("for i in", "-m", "40", "--depth", "1", "--prediction", str(tmp_path / "text"))
    assert found["copied_accepted"] > 20  # type: ignore[operator]


def test_the_prompt_comes_from_standard_input() -> None:
    piped = figures("--max-tokens", "5", stdin="Grüße, 世界")
    assert piped["tokens"] == figures("Grüße, 世界", "--max-tokens", "5")["tokens"]
    assert piped["tokens"] == figures("-", "--max-tokens", "5", stdin="Grüße, 世界")["tokens"]


def test_the_chat_template_is_used_unless_told_otherwise() -> None:
    chat, plain = (figures("hello", "-m", "1", *more) for more in ((), ("--ignore-chat-template",)))
    assert chat["prompt_tokens"] > plain["prompt_tokens"]  # type: ignore[operator]


def on_a_terminal(*arguments: str) -> bytes:
    """What a terminal is sent."""
    leader, follower = pty.openpty()
    program = [str(Path(sys.executable).parent / "mtp-mlx"), *arguments]
    variables = {name: value for name, value in AS_BUILT.items() if name != "NO_COLOR"}
    variables |= {"TERM": "xterm-256color"}
    with subprocess.Popen(program, stdout=follower, stderr=follower, env=variables) as process:
        os.close(follower)
        shown = b""
        while True:
            try:
                chunk = os.read(leader, 4096)
            except OSError:  # Linux's way of saying that the other end is closed
                break
            if not chunk:
                break
            shown += chunk
    assert process.returncode == 0
    return shown


def test_drafts_are_coloured_on_a_terminal() -> None:
    command = ("generate", "def fibonacci(n):", "--max-tokens", "30", "--depth", "4", "--show-drafts")
    shown = on_a_terminal(*command)
    for colour, name in ((b"\x1b[32m", b"accepted"), (b"\x1b[31m", b"correction")):
        assert colour in shown and name in shown


BAD: dict[str, tuple[Callable[[], subprocess.CompletedProcess[str]], str]] = {
    "way of drafting": (lambda: generate("x", "--drafts", "best"), "is not one of auto, coupled, argmax, sampled"),
    "temperature of drafts": (lambda: generate("x", "--draft-temp", "0.5"), "is for --drafts sampled"),
    "temperature of drafts without drawing": (
        lambda: generate("x", "--drafts", "sampled", "--draft-temp", "0.5"),
        "is for texts with --temp above 0",
    ),
    "prediction at depth 0": (lambda: generate("x", "--depth", "0", "--prediction", __file__), "--depth 0 allows none"),
    "bias": (lambda: generate("x", "--logit-bias", "7:4"), "is not ID=VALUE"),
    "bias of nothing": (lambda: generate("x", "--logit-bias", "999=4"), "the model's ids end at 319"),
    "prediction": (lambda: generate("x", "--prediction", "./nowhere"), "cannot be read"),
    "missing folder": (lambda: generate("x", "--model", "/nowhere/at/all"), "is not a folder"),
    "folder without config": (lambda: generate("x", "--model", str(FIXTURES)), "no config.json"),
    "drafter as model": (lambda: generate("x", "--model", VARIANT + "/assistant"), "is a drafter"),
    "wrong drafter": (lambda: generate("x", "--drafter", str(FIXTURES / "gemma4_ple/assistant")), "KV heads"),
    "missing drafter": (lambda: generate("x", "--drafter", "./nowhere"), "is not a folder"),
    "empty prompt": (lambda: generate(""), "prompt is empty"),
    "empty standard input": (lambda: generate(stdin=""), "prompt is empty"),
    "binary standard input": (lambda: generate(stdin=b"\xff\xfe\x00"), "not UTF-8"),
    "prompt over the context": (lambda: generate("word " * 2000), "context is 1024"),
    "no tokens wanted": (lambda: generate("x", "--max-tokens", "0"), "max tokens is 0"),
    "negative tokens": (lambda: generate("x", "--max-tokens", "-5"), "max tokens is -5"),
    "depth is a word": (lambda: generate("x", "--depth", "fast"), "--depth fast"),
    "depth is negative": (lambda: generate("x", "--depth", "-1"), "negative"),
    "depth is huge": (lambda: generate("x", "--depth", "400"), "limit"),
    "depth without drafter": (lambda: generate("x", "--depth", "4", "--drafter", "none"), "needs a drafter"),
    "temperature": (lambda: generate("x", "--temp", "-1"), "temperature"),
    "top-p": (lambda: generate("x", "--temp", "1", "--top-p", "2"), "top-p"),
    "top-p without temperature": (lambda: generate("x", "--top-p", "2"), "top-p"),
    "top-p where nothing is drawn": (lambda: generate("x", "--top-p", "0.9"), "--top-p 0.9 is for texts with --temp"),
    "min-p where nothing is drawn": (lambda: generate("x", "--min-p", "0.1"), "--min-p 0.1 is for texts with --temp"),
    "top-k where nothing is drawn": (lambda: generate("x", "--top-k", "5"), "--top-k 5 is for texts with --temp"),
    "XTC where nothing is drawn": (lambda: generate("x", "--xtc-probability", "0.5"), "--xtc-probability 0.5 is for"),
    "XTC's threshold alone": (lambda: generate("x", "--xtc-threshold", "0.2"), "is for --xtc-probability above 0"),
    "reach of no penalty": (lambda: generate("x", "--penalty-context", "9"), "is for --repetition-penalty"),
    "colours in JSON": (lambda: generate("x", "--json", "--show-drafts"), "--json prints none"),
    "endless temperature": (lambda: generate("x", "--temp", "inf"), "temperature"),
    "prompt that is not UTF-8": (lambda: generate("\udcff\udcfe"), "UTF-8"),
    "name with brackets": (lambda: generate("x", "--model", "[/foo]"), "neither a folder"),
    "empty name": (lambda: generate("x", "--model", ""), "name of a model is empty"),
    "very long name": (lambda: generate("x", "--model", "x" * 5000), "cannot be opened"),
    "dtype": (lambda: generate("x", "--dtype", "int3"), "--dtype int3"),
    "prefill step": (lambda: generate("x", "--prefill-step-size", "0"), "prefill step size"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line_and_exit_1(case: str) -> None:
    call, message = BAD[case]
    done = call()
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("mtp-mlx: ") and done.stderr.count("\n") == 1
    assert message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("closing", [">&-", "<&-", ">/dev/full"])
def test_a_closed_or_full_stream_is_one_line(closing: str) -> None:
    if closing == ">/dev/full" and not Path("/dev/full").exists():
        pytest.skip("a device that is always full exists on Linux only")
    program = Path(sys.executable).parent / "mtp-mlx"
    prompt = "" if closing == "<&-" else "x"
    command = f"'{program}' generate --model '{VARIANT}' {prompt} --max-tokens 4 --no-stats {closing}"
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, timeout=120, check=False, env=AS_BUILT)
    assert done.returncode != 0
    assert done.stderr.startswith(b"mtp-mlx: ") and b"report" not in done.stderr and b"Traceback" not in done.stderr


def test_a_broken_chat_template_names_the_way_out(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(VARIANT, tmp_path / "pair"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "{{ nobody() }}"}))
    done = generate("x", "--model", str(folder))
    assert done.returncode == 1 and "--ignore-chat-template" in done.stderr


def test_wrong_usage_is_exit_2() -> None:
    done = generate("x", "--no-such-option")
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_help_and_version() -> None:
    assert "generate" in run("--help").stdout
    assert "--show-drafts" in run("generate", "--help").stdout
    assert run("--version").stdout.startswith("mtp-mlx 0.")


def test_a_reader_that_goes_away_is_not_an_error_message() -> None:
    program = Path(sys.executable).parent / "mtp-mlx"
    command = f"'{program}' generate --model '{VARIANT}' 'x' --max-tokens 200 --no-stats | head -c 1"
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, timeout=120, check=False, env=AS_BUILT)
    assert b"Traceback" not in done.stderr and b"Error" not in done.stderr


def without_its_drafter(folder: Path) -> tuple[str, ...]:
    """A prompt for a fine-tune that says what it was made from."""
    shutil.copytree(VARIANT, folder)
    shutil.rmtree(folder / "assistant")
    (folder / "README.md").write_text("---\nbase_model: google/gemma-4-31B-it\n---\n")
    return ("x", "--model", str(folder), "-m", "3", "--no-stats")


def test_a_drafter_that_was_found_is_reported_with_the_reason(tmp_path: Path, hub: Loopback) -> None:
    found = generate(*without_its_drafter(tmp_path / "tuned"))
    assert found.returncode == 0
    assert "drafter: google/gemma-4-31B-it-assistant (its model card says it was made from" in found.stderr


def test_a_drafter_that_was_missed_is_reported_with_the_reason(tmp_path: Path, hub: Loopback) -> None:
    hub.close()
    options = without_its_drafter(tmp_path / "tuned")
    missed = generate(*options)
    assert missed.returncode == 0 and missed.stdout == generate(*options, "--drafter", "none").stdout
    assert "drafter: none (" in missed.stderr and "prompt lookup" in missed.stderr


def test_a_drafter_that_does_not_fit_is_reported_beside_the_text() -> None:
    """The tiny pair's weights are random, so no draft is ever right."""
    options = ["x = 1", "--model", QWEN, "--dtype", "float32", "-m", "60", "--depth", "3", "--ignore-chat-template"]
    done = generate(*options, "--no-stats")
    assert "drafting is off" in done.stderr and "another checkpoint" in done.stderr and done.stderr.count("\n") == 1
    answer = json.loads(generate(*options, "--json").stdout)
    assert "drafting is off" in answer["alarm"] and answer["depth"] == 0 and answer["text"] == done.stdout.rstrip("\n")


def test_what_was_decided_about_the_files_is_shown_on_request() -> None:
    done = generate("x", "--model", QWEN, "--dtype", "float32", "-m", "2", "--verbose", "--no-stats")
    assert "the mtp head inside the checkpoint" in done.stderr
    assert "stored as the difference from 1 (the convolutions beside it are laid out as released)" in done.stderr
