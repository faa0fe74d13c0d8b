"""An answer lives as long as its client: cancelled with it, alive while nothing comes, honest about faults."""

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
from served import USER, Scripted, serving
from starlette.testclient import TestClient
from starlette.types import Message, Scope

from mtp_mlx import engine as engine_module
from mtp_mlx.engine import Engine
from mtp_mlx.errors import BusyError
from mtp_mlx.server.limits import Limits
from mtp_mlx.server.reply import Reply

CHAT = "/v1/chat/completions"
LONG: dict[str, Any] = {"messages": USER, "reasoning_effort": "none", "depth": 0}


def _idle(engine: Engine, seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while engine.load != (0, 0) and time.monotonic() < end:
        time.sleep(0.01)
    return engine.load == (0, 0)


def _call(client: TestClient, body: dict[str, Any], leave: Callable[[list[Message]], bool]) -> list[Message]:
    """What an application sends to a client that goes away as soon as `leave` says so."""
    sent: list[Message] = []
    data = json.dumps(body).encode()
    headers = {"host": "testserver", "content-type": "application/json", "content-length": str(len(data))}
    scope: Scope = {
        "type": "http", "method": "POST", "path": CHAT, "raw_path": CHAT.encode(), "query_string": b"",
        "http_version": "1.1", "scheme": "http", "headers": [(k.encode(), v.encode()) for k, v in headers.items()],
    }  # fmt: skip
    first = True

    async def receive() -> Message:
        nonlocal first
        if first:
            first = False
            return {"type": "http.request", "body": data, "more_body": False}
        while not leave(sent):
            await asyncio.sleep(0.005)
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    async def run(app: Callable[..., Awaitable[None]]) -> None:
        await asyncio.wait_for(app(scope, receive, send), 20)

    asyncio.run(run(client.app))
    return sent


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_the_engine(stream: bool) -> None:
    with serving() as (client, engine):
        began = time.monotonic()

        def leave(sent: list[Message]) -> bool:
            return len(sent) > 3 if stream else time.monotonic() - began > 0.5

        engine.script = "word " * 400
        sent = _call(client, LONG | {"stream": stream}, leave)
        assert _idle(engine), "what nobody reads is still written"
        written = b"".join(message.get("body", b"") for message in sent)
        assert b"[DONE]" not in written and written.count(b"word") < 300
        assert 'outcome="cancelled"' in client.get("/metrics").text


def test_a_silent_stream_shows_signs_of_life() -> None:
    limits = Limits(ping=0.05, patience=0.05)
    with serving(limits=limits, slots=1) as (client, engine):
        engine.script = "word " * 150
        busy = engine.stream(_request(client, engine))
        body = LONG | {"stream": True, "max_tokens": 2}
        with client.stream("POST", CHAT, json=body) as answer:
            lines = [line for line in answer.iter_lines() if line]
        busy.close()
        assert lines.count(": ping") >= 2 and lines[-1] == "data: [DONE]"
        assert lines.index(": ping") == 1, "headers and role come at once"


def test_a_prompt_that_is_read_for_long_shows_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "CHUNK", 2)  # so that progress is made all the time
    with serving(limits=Limits(ping=0.05, patience=0.01)) as (client, engine):
        engine.script = "Yes."
        body = LONG | {"stream": True, "messages": [{"role": "user", "content": "word " * 150}]}
        with client.stream("POST", CHAT, json=body) as answer:
            lines = [line for line in answer.iter_lines() if line]
        content = next(i for i, line in enumerate(lines) if "Yes" in line or '"Y' in line)
        assert lines[:content].count(": ping") >= 2 and lines[-1] == "data: [DONE]"


def _request(client: TestClient, engine: Scripted) -> Any:
    client.post(CHAT, json=LONG | {"max_tokens": 1})
    last = engine.seen[-1]
    return replace(last, options=replace(last.options, max_tokens=150))


def test_a_full_queue_is_told_at_once() -> None:
    with serving(waiting=0) as (client, engine):
        answer = client.post(CHAT, json=LONG)
        assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["type"] == "rate_limit_error"
        assert _idle(engine)


def test_choices_that_found_no_place_leave_none_behind() -> None:
    with serving(waiting=1, slots=1) as (client, engine):
        engine.script = "word " * 400
        answer = client.post(CHAT, json=LONG | {"n": 8})
        assert answer.status_code == 429 and _idle(engine)


def test_a_request_that_fails_at_once_has_a_status() -> None:
    with serving() as (client, _):
        for stream in (True, False):
            answer = client.post("/v1/completions", json={"prompt": "", "stream": stream})
            assert answer.status_code == 400 and "prompt is empty" in answer.json()["error"]["message"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_fault_is_told_without_its_details(
    stream: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(self: Reply, event: object) -> None:
        if self.ids or not stream:
            raise RuntimeError("secret detail")
        feed(self, event)  # type: ignore[arg-type]

    feed = Reply.feed
    monkeypatch.setattr(Reply, "feed", broken)
    with serving() as (client, engine), caplog.at_level(logging.ERROR):
        engine.script = "word " * 20
        answer = client.post(CHAT, json=LONG | {"stream": stream})
        text = answer.text
        assert "secret detail" not in text and "Traceback" not in text and "answer.py" not in text
        number = answer.headers["x-request-id"]
        assert number in text
        assert answer.status_code == (200 if stream else 500)
        if stream:
            *_, last = (frame for frame in text.split("\n\n") if frame)
            assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
            assert number in caplog.text and "[DONE]" not in text
        assert _idle(engine)
        assert 'outcome="error"' in client.get("/metrics").text


def test_a_stream_that_the_engine_ends_says_why() -> None:
    with serving(limits=Limits(patience=5)) as (client, engine):
        engine.script = "word " * 400
        with client.stream("POST", CHAT, json=LONG | {"stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            engine.close(5)
            rest = [line for line in lines if line]
        assert json.loads(rest[-1].removeprefix("data: "))["error"]["type"] == "unavailable_error"
        with pytest.raises(BusyError):
            engine.stream(engine.seen[-1])
