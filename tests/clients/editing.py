"""One edit by an agent, from the command line to the file, and what went over the wire meanwhile."""

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from clients.agents import NEW, OLD, Agent
from clients.report import Report
from clients.serving import Body, Exchange, Family, Place, Turn, scripted

PROMPT = "In greet.py, rename the function greet to welcome. Change nothing else."
THOUGHT = "I have to look at the file — “greet.py” — first."
TEXTS = ("I read the file: näive ünïcode 🦊 included.", "Now I change it.")
DONE = "Done: greet is now called welcome. 🦊 Über!"
TITLE = "Renaming a function"
SECONDS = 150
STREAMED = 20_000  # bytes of an answer that is under way
TAIL = 16  # tokens at the end of a prompt that the next one need not begin with
QUIET = 15  # seconds in which the server has to be idle after a client was ended


@dataclass(frozen=True)
class Workplace:
    """A git repository with a file, and a home that nothing else uses."""

    home: Path
    folder: Path

    @property
    def file(self) -> Path:
        return self.folder / "greet.py"

    def environment(self, agent: Agent, url: str) -> dict[str, str]:
        given = {name: self.filled(value) for name, value in agent.environment(url).items()}
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "TERM") if name in os.environ}
        return {"HOME": str(self.home), "CI": "1", "NO_COLOR": "1", **kept, **given}

    def filled(self, text: str, prompt: str = PROMPT) -> str:
        return text.replace("HOME", str(self.home)).replace("PROMPT", prompt)


@contextmanager
def workplace() -> Iterator[Workplace]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        place = Workplace(Path(folder) / "home", Path(folder) / "work")
        place.home.mkdir()
        place.folder.mkdir()
        place.file.write_text(f'{OLD}\n    return f"Hello {{name}}"\n')
        git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org"]
        for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "begin"]):
            subprocess.run([*git, *command], cwd=place.folder, check=True)
        yield place


def checking(agent: Agent) -> Callable[[Family], Report]:
    return lambda family: check(agent, family)


def check(agent: Agent, family: Family) -> Report:
    """Raises AssertionError, saying what went wrong."""
    with workplace() as work, scripted(family, _script(agent, work), skims=True) as place:
        done = _run(agent, work, place)
        said = f"exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        assert done.returncode == 0, said
        assert work.file.read_text().startswith(NEW), f"the file is not changed; {said}"
        assert agent.text or DONE in done.stdout, f"the last text is not shown; {said}"
        talks = _conversation(place)
        _check_wire(talks, agent)
    stops = _check_stop(agent, family)
    calls = "yes" if agent.steps else "-"
    return Report(_version(agent), _streams(talks), stops, calls, calls, _remarks(agent, talks))


def _script(agent: Agent, work: Workplace) -> Any:
    def script(body: Body) -> Turn | str:
        if not agent.steps:
            return Turn(agent.text, THOUGHT)
        if not body.get("tools"):
            return Turn(TITLE)
        done = len(_results(body))
        if done >= len(agent.steps):
            return Turn(DONE)
        name, arguments = agent.steps[done]
        assert name in _tools(body), f"no tool {name} among {_tools(body)}"
        given = json.loads(json.dumps(arguments).replace('"FILE"', json.dumps(str(work.file))))
        return Turn(TEXTS[done], THOUGHT, ((name, given),))

    return script


def _run(agent: Agent, work: Workplace, place: Place) -> subprocess.CompletedProcess[str]:
    _prepare(agent, work, place)
    return subprocess.run(
        [work.filled(word) for word in agent.command],
        cwd=work.folder,
        env=work.environment(agent, place.url),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def _prepare(agent: Agent, work: Workplace, place: Place) -> None:
    for name, text in agent.files(place.url).items():
        path = work.home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    if command := agent.prepare(place.url):
        subprocess.run(
            command,
            env=work.environment(agent, place.url),
            cwd=work.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=SECONDS,
            check=True,
        )


def _conversation(place: Place) -> list[Exchange]:
    """The requests of the conversation that edits; a title is written beside it."""
    chats = [each for each in place.exchanges if each.path.endswith("/chat/completions")]
    refused = [(each.path, each.status, each.answer.decode()[:500]) for each in place.exchanges if each.status >= 400]
    assert not refused, f"refused: {refused}"
    offered = [each for each in chats if each.body.get("tools")]
    return offered or chats


def _check_wire(talks: list[Exchange], agent: Agent) -> None:
    """Calls come back with their ids and arguments, texts whole, and each turn goes on from what the last one left."""
    for earlier, later in pairwise(talks):
        said, messages = _said(earlier), later.body["messages"]
        back = [message for message in messages if message["role"] == "assistant"][-1]
        for call, replayed in zip(said.calls, back.get("tool_calls") or [], strict=True):
            assert replayed["id"] == call["id"], "a call came back under another id"
            assert replayed["function"]["name"] == call["name"]
            assert json.loads(replayed["function"]["arguments"]) == json.loads(call["arguments"]), "arguments changed"
            assert call["id"] in _results(later.body), "a result has the id of no call"
        assert _plain(back.get("content")).strip() == said.content.strip(), "text was lost on the way back"
        assert said.finish == "tool_calls" and said.thoughts == THOUGHT
        assert _said(later).cached >= said.prompt - TAIL, f"{_said(later).cached} tokens cached after {said.prompt}"
    for number, talk in enumerate(talks):
        said, expected = _said(talk), (*TEXTS, DONE) if agent.steps else (agent.text,)
        assert said.content.strip() == expected[min(number, len(expected) - 1)].strip(), f"sent {said.content!r}"


@dataclass(frozen=True)
class Said:
    """An answer, put together from its chunks."""

    content: str
    thoughts: str
    calls: list[dict[str, str]]
    finish: str | None
    prompt: int  # tokens
    cached: int  # of these


def _said(exchange: Exchange) -> Said:
    content, thoughts, finish, read, cached = "", "", None, 0, 0
    calls: list[dict[str, str]] = []
    for event in exchange.events:
        timings = event.get("timings", {})
        read, cached = timings.get("prompt_n", read), timings.get("cache_n", cached)
        for choice in event.get("choices", ()):
            delta: Mapping[str, Any] = choice["delta"] if "delta" in choice else choice["message"]
            content += delta.get("content") or ""
            thoughts += delta.get("reasoning_content") or ""
            finish = choice["finish_reason"] or finish
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    calls.append({"id": call["id"], "name": call["function"]["name"], "arguments": ""})
                calls[-1]["arguments"] += call["function"]["arguments"]
    return Said(content, thoughts.strip(), calls, finish, read + cached, cached)


def _check_stop(agent: Agent, family: Family) -> str:
    """Whether a server rests soon after its client was interrupted in the middle of a stream."""
    with workplace() as work, scripted(family, lambda body: Turn("and so on " * 20000), skims=True) as place:
        _prepare(agent, work, place)
        command = [work.filled(word) for word in agent.command]
        running = subprocess.Popen(
            command,
            cwd=work.folder,
            env=work.environment(agent, place.url),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            _wait(lambda: any(len(each.answer) > STREAMED for each in place.exchanges), SECONDS, "nothing was streamed")
            os.killpg(running.pid, signal.SIGINT)
            return "yes" if _rests(place, QUIET) else _killed(running, place)
        finally:
            if running.poll() is None:
                os.killpg(running.pid, signal.SIGKILL)
            running.wait()


def _killed(running: subprocess.Popen[bytes], place: Place) -> str:
    """An agent may not listen to an interrupt; then it is ended for good."""
    os.killpg(running.pid, signal.SIGKILL)
    assert _rests(place, QUIET), "the server goes on writing for a client that is gone"
    return "if killed"


def _rests(place: Place, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if place.engine.load.live == 0:
            return True
        time.sleep(0.1)
    return False


def _wait(done: Any, seconds: float, trouble: str) -> None:
    until = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < until, trouble
        time.sleep(0.05)


def _tools(body: Body) -> list[str]:
    return [tool["function"]["name"] for tool in body.get("tools") or ()]


def _results(body: Body) -> list[str]:
    """Ids of the calls whose results are told."""
    return [message["tool_call_id"] for message in body["messages"] if message["role"] == "tool"]


def _plain(content: Any) -> str:
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content)
    return content or ""


def _streams(talks: list[Exchange]) -> str:
    return "yes" if all(talk.body.get("stream") for talk in talks) else "no"


def _remarks(agent: Agent, talks: list[Exchange]) -> str:
    sent = f"{len(talks)} turns, first body {len(talks[0].raw) / 1000:.0f} KB, {len(_tools(talks[0].body))} tools"
    cached = ", ".join(str(_said(talk).cached) for talk in talks)
    return "; ".join(filter(None, [agent.remark, sent, f"cached {cached}"]))


def _version(agent: Agent) -> str:
    """As the program tells it, without its name."""
    program = shutil.which(agent.program)
    assert program is not None
    told = subprocess.run(
        [program, "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
    )
    words = [word for word in (told.stdout + told.stderr).split() if word[0].isdigit()]
    return words[0] if words else "?"
