"""A conversation: every answer is the one that the whole conversation so far gets, and nothing said is lost."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from conftest import FIXTURES, program

from mtp_mlx.cli.chat import Answer
from mtp_mlx.conversation import Conversations, Talk
from mtp_mlx.dialects import find_dialect
from mtp_mlx.engine import Piece, Stream
from mtp_mlx.errors import RequestError
from mtp_mlx.generate import stream_generate
from mtp_mlx.loading import load

MODEL = str(FIXTURES / "gemma4_keqv")
OPTIONS = ("chat", "--model", MODEL, "--dtype", "float32", "-m", "12", "--seed", "1")


def _answers(said: list[str], system: str | None = None) -> list[str]:
    """What the model answers to each message, asked for one by one."""
    loaded, tokenizer = load(MODEL, dtype=mx.float32)
    pair = loaded.pair
    conversations = Conversations(tokenizer, find_dialect(tokenizer.get_vocab()))
    messages, answers = [{"role": "system", "content": system}] if system else [], []
    for message in said:
        messages.append({"role": "user", "content": message})
        prompt = conversations.prompt(Talk(messages)).ids
        responses = list(stream_generate(pair, tokenizer, prompt, max_tokens=12, seed=1))
        conversations.remember([*prompt, *(response.token for response in responses)])
        answers.append("".join(response.text for response in responses))
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


def _shown(answers: list[str]) -> str:
    return "".join(answer if answer.endswith("\n") or not answer else answer + "\n" for answer in answers)


@pytest.mark.parametrize("depth", ["0", "3", "auto"])
def test_every_turn_is_answered_in_the_light_of_those_before(depth: str) -> None:
    said = ["def f(x):", "and then?", "for i in"]
    done = program(*OPTIONS, "--depth", depth, stdin="\n".join(said).encode())
    assert done.returncode == 0, done.stderr
    assert done.stdout == _shown(_answers(said)) and "drafting is off" not in done.stdout


def test_commands_do_what_they_say(tmp_path: Path) -> None:
    lines = ["/stats", "hello", "/stats", "/clear", "hello", "/nonsense x", "", "a\\", "b", "/help", "/exit", "never"]
    done = program(*OPTIONS, "--system", "Be brief.", stdin="\n".join(lines).encode())
    assert done.returncode == 0
    first, second = _answers(["hello", "a\nb"], "Be brief.")
    assert done.stdout == _shown([first, first, second])
    for words in ("nothing has been answered yet", "per round", "/nonsense is not a command", "Ctrl-C ends an answer"):
        assert words in done.stderr


def test_what_cannot_be_answered_is_one_line_and_the_conversation_goes_on() -> None:
    done = program(*OPTIONS, stdin=("x " * 2000 + "\nhello\n").encode())
    assert done.returncode == 0 and "context is 1024" in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == _shown(_answers(["hello"]))


def test_a_line_that_the_end_of_input_cuts_short_is_answered() -> None:
    done = program(*OPTIONS, stdin=b"hello\\")
    assert done.returncode == 0 and done.stdout == _shown(_answers(["hello"]))


@pytest.mark.parametrize("place", [(Conversations, "prompt"), (Conversations, "remember"), (Stream, "get")])
def test_ctrl_c_ends_what_is_being_done_and_not_the_conversation(
    place: tuple[type, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a prompt is made, while it is read, and when all has been said."""
    owner, name = place
    whole, calls = vars(owner)[name], list[int]()

    def interrupted(*given: Any, **named: Any) -> Any:
        calls.append(0)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return whole(*given, **named)

    expected = _answers(["hello"])
    monkeypatch.setattr(owner, name, interrupted)
    done = program(*OPTIONS, stdin=b"def f(x):\nhello\n")
    assert done.returncode == 0 and "broken off" in done.stderr
    assert done.stdout.endswith(_shown(expected)), "as if nothing had been said before"


def test_an_answer_that_fails_ends_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    said = list[str]()

    def fail(self: Answer, piece: Piece) -> None:
        take(self, piece)
        said.append(piece.text)
        if len(said) == 3:
            raise RequestError("no more of it")

    take = Answer.take
    monkeypatch.setattr(Answer, "take", fail)
    done = program(*OPTIONS, "--depth", "0", stdin=b"def f(x):\n")
    assert done.returncode == 0 and "no more of it" in done.stderr
    assert "".join(said).strip() and done.stdout.endswith("\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "demo"], "demo has no chat template, so it cannot chat; try mtp-mlx generate"),
        (["--model", MODEL, "--depth", "fast"], "--depth fast"),
        (["--model", MODEL, "--temp", "-1"], "temperature"),
        (["--model", MODEL, "--no-think"], "no switch for thinking; leave --think and --no-think out"),
        (["--model", MODEL, "--top-k", "40"], "--top-k 40 is for texts with --temp above 0"),
    ],
)
def test_bad_options_are_one_line(arguments: list[str], message: str) -> None:
    done = program("chat", *arguments, stdin=b"hello")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("mtp-mlx: ") and message in done.stderr and done.stderr.count("\n") == 1
