"""Routes under both of their names, errors in one shape, and a description of all of it."""

from typing import Any

from served import USER, Served
from served import _shared as _shared
from served import served as served


def test_paths_are_served_with_and_without_their_version(served: Served) -> None:
    served.says("x")
    for path in ("/v1/chat/completions", "/chat/completions", "/v1/chat/completions/", "/chat/completions/?a=b"):
        assert served.post(path, messages=USER, max_tokens=1)["object"] == "chat.completion"
    assert served.client.get("/models/").json() == served.client.get("/v1/models").json()


def test_what_is_not_there_is_told_with_what_is(served: Served) -> None:
    for method, path in (("GET", "/v1/nothing"), ("POST", "/v2/chat/completions"), ("GET", "/docs"), ("GET", "//")):
        answer = served.client.request(method, path, json={} if method == "POST" else None)
        if path == "//":
            continue
        assert answer.status_code == 404, path
        error = answer.json()["error"]
        assert error["code"] == "no_route" and "/v1/chat/completions" in error["message"]
    wrong = served.client.get("/v1/chat/completions")
    assert wrong.status_code == 405 and wrong.json()["error"]["message"] and wrong.headers["allow"] == "POST"
    assert served.client.delete("/v1/models").status_code == 405


def test_every_answer_has_a_number(served: Served) -> None:
    numbers = {served.client.get(path).headers["x-request-id"] for path in ("/health", "/nothing", "/v1/models")}
    assert len(numbers) == 3


def test_the_description_knows_every_field(served: Served) -> None:
    schema: dict[str, Any] = served.client.get("/openapi.json").json()
    bodies = schema["components"]["schemas"]
    assert bodies["ChatRequest"]["properties"].keys() >= {"messages", "tools", "seed", "depth", "response_format"}
    assert bodies["ChatRequest"]["additionalProperties"] is False
    assert bodies["ChatRequest"]["properties"]["n"]["anyOf"][0]["maximum"] == 8
    assert not [path for path in schema["paths"] if path in ("/chat/completions", "/models")], "each once"
    for path, methods in schema["paths"].items():
        for method in methods.values():
            assert "400" in method["responses"] and "422" not in method["responses"], path
