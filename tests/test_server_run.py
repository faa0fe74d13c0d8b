"""A real server on a socket: the SDK that clients use, clients that vanish, and an end in good order."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import openai
import pytest
from openai import OpenAI
from served import CALL, TOOL, USER, Scripted, tiny_loaded

from mtp_mlx.errors import RequestError
from mtp_mlx.server import run
from mtp_mlx.server.app import make_app
from mtp_mlx.server.guard import Access
from mtp_mlx.server.limits import Limits
from mtp_mlx.server.run import Server, listen
from mtp_mlx.server.service import Service

LONG: dict[str, Any] = {"messages": USER, "reasoning_effort": "none", "depth": 0}


@dataclass(frozen=True)
class Running:
    """A server in a thread."""

    engine: Scripted
    server: Server
    thread: threading.Thread
    port: int

    @property
    def sdk(self) -> OpenAI:
        return OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="key", max_retries=0)

    def ask(self, body: dict[str, Any], path: str = "/v1/chat/completions") -> socket.socket:
        """A connection on which a request has been sent."""
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nauthorization: Bearer key"
        asking = socket.create_connection(("127.0.0.1", self.port), 20)
        asking.sendall(f"{head}\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)
        return asking


@contextmanager
def running(limits: Limits | None = None) -> Iterator[Running]:
    loaded = tiny_loaded()
    engine = Scripted(loaded)
    limits = limits or Limits(grace=0.3)
    service = Service.of(loaded, engine, slots=4, names=("tiny",))
    server = Server(make_app(service, limits, Access.of("127.0.0.1", key="key")), engine, limits)
    bound = listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    try:
        yield Running(engine, server, thread, bound.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(20)
        engine.close(10)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def live() -> Iterator[Running]:
    with running() as server:
        yield server


def _busy(server: Running, live: int) -> bool:
    end = time.monotonic() + 10
    while server.engine.load.live != live and time.monotonic() < end:
        time.sleep(0.01)
    return server.engine.load.live == live


def test_the_sdk_talks_to_it(live: Running) -> None:
    assert [model.id for model in live.sdk.models.list()] == ["tiny"]
    live.engine.script = f"Well.{CALL}"
    asked: Any = {"model": "tiny", "messages": USER, "tools": [TOOL], "reasoning_effort": "none"}
    whole = live.sdk.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    call: Any = (whole.choices[0].message.tool_calls or [])[0]
    assert whole.choices[0].finish_reason == "tool_calls" and whole.choices[0].message.content == "Well."
    assert json.loads(call.function.arguments) == {"city": "Paris", "days": 3}
    with live.sdk.chat.completions.stream(**asked, stream_options={"include_usage": True}) as stream:
        final = stream.get_final_completion()
    streamed: Any = (final.choices[0].message.tool_calls or [])[0]
    assert streamed.function.arguments == call.function.arguments and final.choices[0].message.content == "Well."
    assert final.usage is not None and whole.usage is not None
    assert final.usage.completion_tokens == whole.usage.completion_tokens


def test_the_sdk_completes_and_reads_errors(live: Running) -> None:
    live.engine.script = "there"
    completion = live.sdk.completions.create(model="tiny", prompt="Hi ", max_tokens=20, logprobs=1)
    assert completion.choices[0].text == "there" and completion.choices[0].logprobs
    pieces = [chunk.choices[0].text for chunk in live.sdk.completions.create(model="tiny", prompt="Hi ", stream=True)]
    assert "".join(pieces) == "there"
    with pytest.raises(openai.BadRequestError, match="maximum context length") as error:
        live.sdk.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi " * 2000}])
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError, match="not served here"):
        live.sdk.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": "hi"}])
    wrong = OpenAI(base_url=live.sdk.base_url, api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        wrong.models.list()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_is_noticed(live: Running, stream: bool) -> None:
    live.engine.script = "word " * 400
    with live.ask(LONG | {"stream": stream}):
        assert _busy(live, 1)
    assert _busy(live, 0), "the engine writes on for nobody"
    live.engine.script = "Yes."
    assert live.sdk.chat.completions.create(model="tiny", messages=USER).choices  # type: ignore[arg-type]


def test_a_request_in_chunks_is_taken_and_connections_are_kept(live: Running) -> None:
    live.engine.script = "x"
    data = json.dumps(LONG | {"max_tokens": 1}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    head += b"authorization: Bearer key\r\ntransfer-encoding: chunked\r\n\r\n"
    with socket.create_connection(("127.0.0.1", live.port), 20) as asking:
        for _ in range(2):
            asking.sendall(head + b"5\r\n" + data[:5] + b"\r\n%x\r\n" % (len(data) - 5) + data[5:] + b"\r\n0\r\n\r\n")
            answer = b""
            while b"speculation" not in answer:
                answer += asking.recv(65536)
            assert answer.startswith(b"HTTP/1.1 200") and b"server: uvicorn" not in answer.lower()


def test_headers_that_do_not_come_are_not_waited_for(live: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "HEADERS", 0.2)
    for beginning in (b"", b"GET /health HTTP/1.1\r\nhost: loc"):
        with socket.create_connection(("127.0.0.1", live.port), 20) as slow:
            slow.sendall(beginning)
            assert slow.recv(100) == b""
    with socket.create_connection(("127.0.0.1", live.port), 20) as large:
        large.sendall(b"GET /health HTTP/1.1\r\nx: " + b"y" * 70_000)
        assert large.recv(100).startswith(b"HTTP/1.1 400")


def test_running_answers_may_finish_when_the_server_stops() -> None:
    with running(Limits(grace=20)) as server:
        server.engine.script = "word " * 30
        asking = server.ask(LONG | {"stream": True})
        assert _busy(server, 1)
        server.server.should_exit = True
        assert _all(asking).rstrip().endswith(b"data: [DONE]\n\n\r\n0".rstrip())
        server.thread.join(10)
        assert not server.thread.is_alive()


def test_answers_that_take_too_long_are_told_why_they_end() -> None:
    with running(Limits(grace=0.2)) as server:
        server.engine.script = "word " * 400
        asking = server.ask(LONG | {"stream": True})
        assert _busy(server, 1)
        server.server.should_exit = True
        text = _all(asking)
        assert b"unavailable_error" in text and b"[DONE]" not in text
        server.thread.join(10)
        assert not server.thread.is_alive()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", server.port), 1).close()


def _all(connection: socket.socket) -> bytes:
    """What comes until the server hangs up."""
    parts = []
    with connection:
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def test_a_port_in_use_is_told_plainly() -> None:
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(RequestError, match=f"port {port} of 127.0.0.1 is taken"):
            listen("127.0.0.1", port)
    with pytest.raises(RequestError, match="no address of this machine"):
        listen("no.such.host.invalid", 0)
    with pytest.raises(RequestError, match=r"cannot listen on port 0 of 192\.0\.2\.1"):
        listen("192.0.2.1", 0)
