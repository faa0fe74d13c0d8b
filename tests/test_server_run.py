"""A real server on a socket: the SDK that clients use, clients that vanish, and an end in good order."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
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
from mtp_mlx.server.service import Defaults, Service

LONG: dict[str, Any] = {"messages": USER, "reasoning_effort": "none", "depth": 0}


@dataclass(frozen=True)
class Running:
    """A server in a thread."""

    engine: Scripted
    server: Server
    thread: threading.Thread
    port: int
    sdk: OpenAI

    def ask(self, body: dict[str, Any], path: str = "/v1/chat/completions") -> socket.socket:
        """A connection on which a request has been sent."""
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nauthorization: Bearer key"
        asking = socket.create_connection(("127.0.0.1", self.port), 20)
        asking.sendall(f"{head}\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)
        return asking


@contextmanager
def running(limits: Limits | None = None, defaults: Defaults | None = None) -> Iterator[Running]:
    loaded = tiny_loaded()
    engine = Scripted(loaded)
    limits = limits or Limits(grace=0.3)
    service = Service.of(loaded, engine, slots=4, names=("tiny",), defaults=defaults)
    server = Server(make_app(service, limits, Access.of("127.0.0.1", key="key")), engine, limits)
    bound = listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    port = bound.getsockname()[1]
    try:
        with OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="key", max_retries=0) as sdk:
            yield Running(engine, server, thread, port, sdk)
    finally:
        server.should_exit = True
        thread.join(20)
        engine.close(10)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def live() -> Iterator[Running]:
    with running() as server:
        yield server


def _within(seconds: float, holds: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.01)
    return holds()


def _busy(server: Running, live: int) -> bool:
    return _within(10, lambda: server.engine.load.live == live)


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
    with wrong, pytest.raises(openai.AuthenticationError):
        wrong.models.list()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_is_noticed(live: Running, stream: bool) -> None:
    live.engine.script = "word " * 400
    with live.ask(LONG | {"stream": stream}):
        assert _busy(live, 1)
    assert _busy(live, 0), "the engine writes on for nobody"
    live.engine.script = "Yes."
    assert live.sdk.chat.completions.create(model="tiny", messages=USER).choices  # type: ignore[arg-type]


def test_a_client_that_reads_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "STALL", 0.2)
    with running() as server, socket.socket() as asking:
        asking.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        asking.connect(("127.0.0.1", server.port))
        body = json.dumps({"messages": [{"role": "user", "content": "x" * 10**7}]}).encode()
        head = b"POST /apply-template HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        asking.sendall(head + b"authorization: Bearer key\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        assert _within(10, lambda: bool(server.server.server_state.tasks))
        assert _within(10, lambda: not server.server.server_state.connections), "it is waited for"


def test_a_client_that_reads_slowly_gets_all_of_it(live: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "STALL", 0.5)
    with live.ask({"messages": [{"role": "user", "content": "x" * 10**7}]}, "/apply-template") as asking:
        read = 0
        while read < 10**7:
            part = asking.recv(2**20)
            assert part, "the server has hung up"
            read += len(part)
            time.sleep(0.05)


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


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\r\n\r\n",  # a browser that was told https
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: localhost\r\nhost: localhost\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-length: -1\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: gzip, chunked\r\n\r\n",
    ],
    ids=["tls", "no host", "two hosts", "length", "encoding"],
)
def test_what_is_no_http_is_told_in_json(live: Running, data: bytes) -> None:
    with socket.create_connection(("127.0.0.1", live.port), 20) as asking:
        asking.sendall(data)
        head, _, body = _all(asking).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400") and b"connection: close" in head.lower()
    assert b"content-type: application/json" in head.lower()
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


def test_a_body_that_breaks_after_its_answer_ends_the_connection(
    live: Running, caplog: pytest.LogCaptureFixture
) -> None:
    head = b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", live.port), 20) as asking:
        asking.sendall(head + b"transfer-encoding: chunked\r\n\r\n")
        assert _answer(asking).startswith(b"HTTP/1.1 401")
        asking.sendall(b"no chunk\r\n")
        assert asking.recv(65536) == b""
    assert "Traceback" not in caplog.text and not any(record.exc_info for record in caplog.records)


def test_a_connection_too_many_is_told_so_and_the_others_go_on() -> None:
    with running(Limits(connections=2, grace=0.3)) as server:
        head = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
        held = [socket.create_connection(("127.0.0.1", server.port), 20) for _ in range(2)]
        for each in held:
            each.sendall(head)
            assert _answer(each).startswith(b"HTTP/1.1 200")
        with socket.create_connection(("127.0.0.1", server.port), 20) as third:
            third.sendall(head)
            answer = _all(third)
        assert answer.startswith(b"HTTP/1.1 503") and b"retry-after: 1" in answer.lower()
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "unavailable"
        for each in held:
            each.sendall(head)
            assert _answer(each).startswith(b"HTTP/1.1 200")
            each.close()
        assert _within(5, lambda: not server.server.server_state.connections)
        with socket.create_connection(("127.0.0.1", server.port), 20) as again:
            again.sendall(head)
            assert _answer(again).startswith(b"HTTP/1.1 200")


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


@pytest.mark.parametrize("stream", [True, False])
def test_a_second_signal_ends_it_at_once_and_without_a_fault(stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    with running(Limits(grace=60)) as server, caplog.at_level("INFO"):
        server.engine.script = "word " * 400
        with server.ask(LONG | {"stream": stream}):
            assert _busy(server, 1)
            server.server.should_exit = server.server.force_exit = True
            server.thread.join(5)
            assert not server.thread.is_alive() and _busy(server, 0)
    assert not any(record.exc_info for record in caplog.records), caplog.text
    assert "499 cancelled" in caplog.text


def _answer(connection: socket.socket) -> bytes:
    """One answer whose body is JSON, in however many parts it comes."""
    answer = b""
    while not answer.endswith(b"}"):
        part = connection.recv(65536)
        assert part, "the server has hung up"
        answer += part
    return answer


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
