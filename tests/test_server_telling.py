"""What a server tells about itself and its model."""

from conftest import FIXTURES
from served import USER, Served, serving
from served import _shared as _shared
from served import served as served


def test_the_one_model_is_listed_with_its_context(served: Served) -> None:
    body = served.client.get("/v1/models").json()
    (model,) = body["data"]
    assert body["object"] == "list" and model["id"] == "tiny" and model["object"] == "model"
    assert model["context_length"] == model["max_model_len"] == model["meta"]["n_ctx"] == 1024
    assert model["capabilities"] == ["completion", "chat", "tools", "infill"]
    assert served.client.get("/v1/models/tiny").json() == model == served.client.get("/models/org/tiny").json()
    missing = served.client.get("/v1/models/gpt-4o")
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "model_not_found"


def test_clients_are_not_told_where_files_lie(served: Served) -> None:
    listed, told = (served.client.get(path).json() for path in ("/v1/models", "/props"))
    assert listed["data"][0]["meta"]["drafter"] == told["drafter"] == "qwen3_5_tied"
    assert str(FIXTURES) not in str(listed)


def test_another_model_is_not_served_under_a_false_name(served: Served) -> None:
    for path, body in (
        ("/v1/chat/completions", {"messages": USER}),
        ("/v1/completions", {"prompt": "x"}),
        ("/infill", {"input_prefix": "x"}),
        ("/tokenize", {"content": "x"}),
    ):
        answer = served.client.post(path, json=body | {"model": "../etc/passwd"})
        assert answer.status_code == 404 and "'tiny'" in answer.json()["error"]["message"]
    assert served.post("/tokenize", content="x", model="org/tiny")["tokens"]


def test_health_has_a_status(served: Served) -> None:
    for path in ("/health", "/v1/health"):
        assert served.client.get(path).json() == {"status": "ok", "live": 0, "waiting": 0}


def test_the_page_is_served_and_talks_to_nobody_else(served: Served) -> None:
    page = served.client.get("/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert served.client.head("/").status_code == 200


def test_properties_are_those_that_clients_look_for(served: Served) -> None:
    body = served.client.get("/props").json()
    assert body["default_generation_settings"]["n_ctx"] == 1024 and body["total_slots"] == 4
    assert "<|im_start|>" in body["chat_template"] and body["drafter_reason"]


def test_texts_and_tokens_are_turned_into_each_other(served: Served) -> None:
    text = "Grüße, <think>\U0001f600"
    tokens = served.post("/tokenize", content=text)["tokens"]
    assert served.engine.words.convert_tokens_to_ids("<think>") in tokens
    assert served.post("/detokenize", tokens=tokens) == {"content": text}
    pieces = served.post("/tokenize", content="ab c", with_pieces=True)["tokens"]
    assert "".join(piece["piece"] for piece in pieces) == "ab c"
    assert "vocabulary" in served.refused("/detokenize", tokens=[999])["message"]


def test_a_template_can_be_looked_at(served: Served) -> None:
    prompt = served.post("/apply-template", messages=USER, reasoning_effort="none")["prompt"]
    assert prompt == "<|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\n"
    served.says("x").post("/v1/chat/completions", messages=USER, reasoning_effort="none")
    assert served.post("/tokenize", content=prompt)["tokens"] == served.engine.seen[-1].prompt


def test_a_server_without_gaps_does_not_promise_them() -> None:
    with serving(infill=False) as (client, _):
        assert "infill" not in client.get("/v1/models").json()["data"][0]["capabilities"]
