"""Who is let in: hosts, origins, keys, and bodies that are whole, small, in time and JSON."""

import asyncio
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from served import USER, Served, serving
from served import _shared as _shared
from served import served as served
from starlette.types import Message, Scope

from mtp_mlx.server.guard import Access, Guard
from mtp_mlx.server.limits import Limits

CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}
NAMED = Access.of("192.168.1.5", ("Box.local",), ("https://page.example",))


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LocalHost:8080",
        "127.0.0.1:1",
        "[::1]:8080",
        "a.localhost",
        "localhost.",
        "192.168.1.5",
        "box.local",
    ],
)
def test_known_hosts_are_let_in(host: str) -> None:
    assert NAMED.knows(host)


@pytest.mark.parametrize(
    "host",
    ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "", "10.0.0.1", "a@localhost", "localhost:x",
     "localhost/", "[::1", "xlocalhost", "localhost:80:80"],
)  # fmt: skip
def test_other_hosts_are_not(host: str) -> None:
    assert not NAMED.knows(host)


def test_a_server_on_all_addresses_takes_any_address_but_no_name() -> None:
    anywhere = Access.of("0.0.0.0")
    assert anywhere.knows("192.168.7.7:8080") and anywhere.knows("[fe80::1]:8080") and anywhere.knows("localhost")
    assert not anywhere.knows("evil.example") and not anywhere.knows("0.0.0.0.evil.example")


def test_a_page_that_rebinds_a_name_gets_nothing(served: Served) -> None:
    for path in ("/health", "/v1/models", "/"):
        answer = served.client.get(path, headers={"host": "evil.example"})
        assert answer.status_code == 403 and "evil.example" in answer.json()["error"]["message"]
    # Its own origin and its own host agree, which must not help it.
    page = {"host": "evil.example", "origin": "http://evil.example"}
    assert served.client.get("/health", headers=page).status_code == 403


def test_pages_may_ask_only_if_they_are_listed_or_the_servers_own() -> None:
    access = Access(hosts=frozenset({"testserver"}), origins=frozenset({"https://page.example"}))
    with serving(access=access) as (client, engine):
        engine.script = "x"
        body = {"messages": USER, "max_tokens": 1}
        for origin in ("https://evil.example", "null", "https://page.example.evil.example", "http://page.example"):
            answer = client.post(CHAT, json=body, headers={"origin": origin})
            assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers
        assert not engine.seen
        for origin in ("https://page.example", "http://testserver"):
            answer = client.post(CHAT, json=body, headers={"origin": origin})
            assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == origin
            assert "Origin" in answer.headers["vary"]
        asked = {"origin": "https://page.example", "access-control-request-method": "POST"}
        preflight = client.options(CHAT, headers=asked)
        assert preflight.status_code == 204 and "POST" in preflight.headers["access-control-allow-methods"]
        assert preflight.headers["access-control-allow-headers"] == "authorization, content-type, x-api-key"
        own = {"access-control-request-headers": "content-type,x-stainless-os"}
        assert client.options(CHAT, headers=asked | own).headers["access-control-allow-headers"] == own.popitem()[1]
        assert client.options(CHAT, headers=asked | {"origin": "https://evil.example"}).status_code == 403
        # No header at all without an origin.
        assert "access-control-allow-origin" not in client.get("/health").headers


def test_without_its_key_only_health_and_the_page_answer() -> None:
    access = Access(hosts=frozenset({"testserver"}), key="s3cret-ü")
    with serving(access=access) as (client, engine):
        engine.script = "x"
        assert client.get("/health").status_code == client.get("/").status_code == client.head("/").status_code == 200
        for headers in ({}, {"authorization": "Bearer wrong"}, {"x-api-key": ""}, {"authorization": "s3cret"}):
            answer = client.post(CHAT, json={"messages": USER}, headers=headers)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert client.get("/metrics", headers=headers).status_code == 401
            assert client.get("/nothing", headers=headers).status_code == 401
        for name, value in (
            ("authorization", "Bearer s3cret-ü"),
            ("authorization", "bearer s3cret-ü"),
            ("x-api-key", "s3cret-ü"),
        ):
            given = {name.encode(): value.encode()}
            answer = client.post(CHAT, json={"messages": USER, "max_tokens": 1}, headers=given)
            assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"{}", {"content-type": "text/plain"}, 415),
        (b"{}", {"content-type": "application/x-www-form-urlencoded"}, 415),
        (b"{}", {}, 415),
        (b"\x1f\x8b\x08", JSON | {"content-encoding": "gzip"}, 415),
        ('{"prompt": "x"}'.encode("utf-16"), JSON, 400),
        (b"{", JSON, 400),
        (b"", JSON, 400),
        (b"[]", JSON, 400),
        (b'"x"', JSON, 400),
        (b"\xff{}", JSON, 400),
        (b'{"messages": "\\ud800"}', JSON, 400),
        (b"[" * 100 + b"]" * 100, JSON, 400),
        (b'{"a":' * 100 + b"1" + b"}" * 100, JSON, 400),
        (b'{"n": ' + b"9" * 5000 + b"}", JSON, 400),
    ],
)
def test_bodies_that_are_none_are_refused(served: Served, body: bytes, headers: dict[str, str], status: int) -> None:
    answer = served.client.post(CHAT, content=body, headers=headers)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"] and "Traceback" not in answer.text


def test_a_content_type_may_name_its_charset(served: Served) -> None:
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    body = b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}'
    assert served.client.post(CHAT, content=body, headers=headers).status_code == 200


def test_large_bodies_are_refused_by_their_length_or_as_they_come() -> None:
    with serving(limits=Limits(body=1000)) as (client, _):
        long = b'{"messages": "' + b"x" * 2000 + b'"}'
        told = client.post(CHAT, content=long, headers=JSON)
        assert told.status_code == 413 and "1000 bytes" in told.json()["error"]["message"]
        assert told.headers["connection"] == "close"
        untold = client.post(CHAT, content=iter([long[:900], long[900:]]), headers=JSON)
        assert untold.status_code == 413


def _ask(guard: Guard, headers: dict[str, str], messages: list[Message], method: str = "POST") -> dict[str, Any]:
    """What a guard sends when a client's messages stop coming after these."""
    sent: list[Message] = []
    scope: Scope = {
        "type": "http", "method": method, "path": CHAT,
        "headers": [(name.encode(), value.encode()) for name, value in ({"host": "localhost"} | headers).items()],
    }  # fmt: skip

    async def receive() -> Message:
        if messages:
            return messages.pop(0)
        await asyncio.sleep(60)
        raise AssertionError("nobody waits so long")

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(guard(scope, receive, send))
    return {"status": sent[0]["status"], "body": b"".join(message.get("body", b"") for message in sent[1:])}


async def _nothing(scope: Scope, receive: Any, send: Any) -> None:
    raise AssertionError("this must not be let through")


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    guard = Guard(_nothing, Access(), Limits(arrival=0.05))
    started = [{"type": "http.request", "body": b"{", "more_body": True}]
    slow = _ask(guard, JSON | {"content-length": "10"}, list(started))
    assert slow["status"] == 408 and b"0.05 seconds" in slow["body"]
    gone = _ask(guard, JSON | {"content-length": "10"}, [*started, {"type": "http.disconnect"}])
    assert gone["status"] == 400 and b"cut off" in gone["body"]


@settings(max_examples=50, deadline=None)
@given(borders=st.lists(st.integers(0, 60), max_size=60), empty=st.booleans())
def test_a_body_is_the_same_however_it_arrives(borders: list[int], empty: bool) -> None:
    body = '{"content": "naïve \U0001f600 \\ud83d\\ude00", "a": [1]}'.encode()
    cuts = [0, *sorted({border for border in borders if border < len(body)}), len(body)]
    parts = [body[start:end] for start, end in pairwise(cuts)] + [b""] * empty
    messages: list[Message] = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    messages[-1]["more_body"] = False
    read: list[Message] = []

    async def app(scope: Scope, receive: Any, send: Any) -> None:
        read.append(await receive())
        await send({"type": "http.response.start", "status": 200, "headers": []})

    chunked = _ask(Guard(app, Access(), Limits()), JSON | {"transfer-encoding": "chunked"}, messages)
    assert chunked["status"] == 200
    assert read == [{"type": "http.request", "body": body, "more_body": False}]


def test_a_body_needs_a_length() -> None:
    guard = Guard(_nothing, Access(), Limits())
    assert _ask(guard, JSON, [])["status"] == 411
    for length in ("-5", "x", "1e3", "²"):
        assert _ask(guard, JSON | {"content-length": length}, [])["status"] == 400
    both = _ask(guard, JSON | {"content-length": "2", "transfer-encoding": "chunked"}, [])
    assert both["status"] == 400 and b"contradict" in both["body"]
    assert _ask(guard, JSON | {"content-length": "9" * 30}, [])["status"] == 413


def test_hosts_must_be_given_once() -> None:
    scope: Scope = {"type": "http", "method": "GET", "path": "/health", "headers": [(b"host", b"localhost")] * 2}
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    guard = Guard(_nothing, Access(), Limits())
    asyncio.run(guard(dict(scope), receive, send))
    asyncio.run(guard({**scope, "headers": []}, receive, send))
    assert [message["status"] for message in sent if "status" in message] == [403, 403]


def test_websockets_are_closed() -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(Guard(_nothing, Access(), Limits())({"type": "websocket"}, _nothing, send))  # type: ignore[arg-type]
    assert sent == [{"type": "websocket.close", "code": 1008}]
