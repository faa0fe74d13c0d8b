"""Answers of chats: OpenAI's shape, and a stream that says what the body says."""

import json
from typing import Any

import pytest
from served import CALL, END, TOOL, USER, Served, serving
from served import _shared as _shared
from served import served as served

from mtp_mlx.sampling import Greedy, Sample

CHAT = "/v1/chat/completions"
PLAIN: dict[str, Any] = {"messages": USER, "reasoning_effort": "none"}
SECOND = CALL.replace("Paris", "Rome").replace("3", "14")
BROKEN = "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\nor so\n</tool_call>"


def fold(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a client makes of the chunks of one choice, with its finish reason."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "calls": {}, "finish": None, "logprobs": []}
    for chunk in chunks:
        for choice in chunk["choices"]:
            assert message["finish"] is None, "nothing follows a finish reason"
            delta = choice["delta"]
            for name in ("content", "reasoning_content"):
                message[name] += delta.get(name) or ""
            for call in delta.get("tool_calls", ()):
                name, arguments = message["calls"].get(call["index"], ("", ""))
                function = call["function"]
                message["calls"][call["index"]] = name + function.get("name", ""), arguments + function["arguments"]
            message["logprobs"] += (choice["logprobs"] or {}).get("content", [])
            message["finish"] = choice["finish_reason"]
    return message


def _calls(message: dict[str, Any]) -> list[tuple[str, Any]]:
    return [
        (call["function"]["name"], json.loads(call["function"]["arguments"])) for call in message.get("tool_calls", ())
    ]


def test_an_answer_has_the_shape_of_openai(served: Served) -> None:
    body = served.says("Hi there!").post(CHAT, **PLAIN)
    assert body["object"] == "chat.completion" and body["id"].startswith("chatcmpl-") and body["model"] == "tiny"
    assert isinstance(body["created"], int) and body["system_fingerprint"].startswith("fp_")
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hi there!", "refusal": None}
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "stop", None)
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens"] == len(served.engine.seen[-1].prompt)
    assert usage["completion_tokens"] == body["timings"]["predicted_n"] > 3
    assert body["speculation"].keys() >= {"depth", "reason", "tokens_per_round", "accepted_per_position", "alarm"}
    assert body["speculation"]["texts_per_round"] == 1.0


@pytest.mark.parametrize(
    ("script", "thinking", "expected"),
    [
        ("Hello, wörld! \U0001f600\n", False, ("Hello, wörld! \U0001f600\n", "", [], "stop")),
        ("First,\nthen.\n</think>\n\nAnswer.", True, ("Answer.", "First,\nthen.", [], "stop")),
        (f"Well.\n{CALL}", False, ("Well.", "", [("weather", {"city": "Paris", "days": 3})], "tool_calls")),
        (
            f"{CALL}\n{SECOND}",
            False,
            (
                "",
                "",
                [("weather", {"city": "Paris", "days": 3}), ("weather", {"city": "Rome", "days": 14})],
                "tool_calls",
            ),
        ),
        (f"No {BROKEN}", False, (f"No {BROKEN}", "", [], "stop")),
        ("", False, ("", "", [], "stop")),
    ],
    ids=["text", "thoughts", "call", "two calls", "broken call", "nothing"],
)
def test_a_stream_says_what_the_body_says(
    served: Served, script: str, thinking: bool, expected: tuple[str, str, list[tuple[str, Any]], str]
) -> None:
    asked = {"messages": USER, "reasoning_effort": "low" if thinking else "none", "tools": [TOOL], "logprobs": True}
    body = served.says(script).post(CHAT, **asked)["choices"][0]
    message = body["message"]
    said = (message["content"] or "", message.get("reasoning_content", ""), _calls(message), body["finish_reason"])
    assert said == expected
    chunks = served.stream(CHAT, **asked)
    folded = fold(chunks)
    whole = folded["calls"]
    assert (folded["content"], folded["reasoning_content"], folded["finish"]) == (expected[0], expected[1], expected[3])
    if script.startswith("No"):  # it was streamed before it broke, and what came of it is no JSON
        with pytest.raises(json.JSONDecodeError):
            json.loads(whole[0][1])
    else:
        assert [(name, json.loads(arguments)) for name, arguments in whole.values()] == expected[2]
    tokens = [token["token"] for token in folded["logprobs"]]
    assert tokens == [token["token"] for token in body["logprobs"]["content"]], "each token is told of once"


def test_a_stream_is_framed_as_clients_expect(served: Served) -> None:
    chunks = served.says("Hi there!").stream(CHAT, **PLAIN)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
    assert not any("role" in delta for delta in deltas[1:])
    assert all("usage" not in chunk for chunk in chunks)
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons[-1] == "stop" and set(reasons[:-1]) == {None}
    with_usage = served.stream(CHAT, **PLAIN, stream_options={"include_usage": True})
    assert with_usage[-1]["choices"] == [] and with_usage[-1]["usage"]["completion_tokens"] > 3
    assert all(chunk["usage"] is None for chunk in with_usage[:-1])


def test_a_call_is_streamed_piece_by_piece(served: Served) -> None:
    chunks = served.says(CALL).stream(CHAT, **PLAIN, tools=[TOOL], depth=0)
    calls = [call for chunk in chunks for choice in chunk["choices"] for call in choice["delta"].get("tool_calls", ())]
    first, *rest = calls
    assert first["type"] == "function" and first["function"] == {"name": "weather", "arguments": ""} and first["id"]
    assert len(rest) > 3 and all(call.keys() == {"index", "function"} for call in rest)


def test_tokens_are_told_with_their_bytes_and_rivals(served: Served) -> None:
    answer = served.says("Grüße \U0001f600").post(CHAT, **PLAIN, logprobs=True, top_logprobs=3)
    told = answer["choices"][0]["logprobs"]["content"]
    said = b"".join(bytes(token["bytes"]) for token in told)
    assert said.decode().removesuffix(END) == "Grüße \U0001f600"
    assert all(len(token["top_logprobs"]) == 3 and token["logprob"] <= 0 for token in told)
    assert all(
        best["logprob"] >= token["top_logprobs"][1]["logprob"] for token in told for best in token["top_logprobs"][:1]
    )
    bare = served.post(CHAT, **PLAIN, logprobs=True)["choices"][0]["logprobs"]["content"]
    assert all(token["top_logprobs"] == [] for token in bare)


def test_a_text_ends_at_a_stop_text_or_a_limit_and_says_which(served: Served) -> None:
    served.says("One two three four")
    choice = served.post(CHAT, **PLAIN, stop=["three", "never"])["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("One two ", "stop")
    for limit in ("max_tokens", "max_completion_tokens"):
        body = served.post(CHAT, **PLAIN, **{limit: 2})
        assert body["choices"][0]["finish_reason"] == "length" and body["usage"]["completion_tokens"] == 2
    # A call that a stop text cuts off is none, even though nothing but its end is missing.
    choice = served.says(CALL).post(CHAT, **PLAIN, tools=[TOOL], stop="</function>")["choices"][0]
    assert choice["finish_reason"] == "stop" and "tool_calls" not in choice["message"]
    assert choice["message"]["content"].startswith("<tool_call>")


def test_a_reply_may_end_with_its_first_call(served: Served) -> None:
    served.says(f"{CALL}\n{SECOND}")
    body = served.post(CHAT, **PLAIN, tools=[TOOL], parallel_tool_calls=False)
    assert _calls(body["choices"][0]["message"]) == [("weather", {"city": "Paris", "days": 3})]
    assert served.engine.streams[-1]._job.cancelled.is_set(), "what nobody will read is still written"
    folded = fold(served.stream(CHAT, **PLAIN, tools=[TOOL], parallel_tool_calls=False))
    assert list(folded["calls"]) == [0] and folded["finish"] == "tool_calls"


def test_tool_choice_decides_what_the_model_is_told_of(served: Served) -> None:
    served.says(CALL)
    none = served.post(CHAT, **PLAIN, tools=[TOOL], tool_choice="none")["choices"][0]
    assert none["message"]["content"] == CALL and none["finish_reason"] == "stop"
    assert served.engine.seen[-1].prompt == _prompt(served)
    other = TOOL | {"function": TOOL["function"] | {"name": "other"}}  # type: ignore[operator]
    chosen = {"type": "function", "function": {"name": "weather"}}
    served.post(CHAT, **PLAIN, tools=[TOOL], tool_choice="required")
    alone = served.engine.seen[-1]
    served.post(CHAT, **PLAIN, tools=[other, TOOL], tool_choice=chosen)
    assert served.engine.seen[-1].prompt == alone.prompt, "the chosen tool is the only one"
    assert alone.options.grammar is not None and served.engine.seen[-1].options.grammar is not None
    served.post(CHAT, **PLAIN, tools=[TOOL], tool_choice="auto")
    assert served.engine.seen[-1].options.grammar is None
    assert "no tools" in served.refused(CHAT, **PLAIN, tool_choice="required")["message"]
    error = served.refused(CHAT, **PLAIN, tools=[other], tool_choice=chosen)
    assert error["param"] == "tool_choice" and "weather" in error["message"]


def _prompt(served: Served) -> list[int]:
    """The prompt without tools."""
    served.post(CHAT, **PLAIN)
    return served.engine.seen[-1].prompt


def test_several_choices_have_seeds_of_their_own(served: Served) -> None:
    body = served.post(CHAT, **PLAIN, n=3, seed=7, temperature=1.0, max_tokens=8)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert [request.options.seed for request in served.engine.seen] == [7, 8, 9]
    texts = [choice["message"]["content"] for choice in body["choices"]]
    assert len(set(texts)) > 1
    chunks = served.stream(CHAT, **PLAIN, n=3, seed=7, temperature=1.0, max_tokens=8)
    for number, text in enumerate(texts):
        mine = [
            chunk | {"choices": [choice]}
            for chunk in chunks
            for choice in chunk["choices"]
            if choice["index"] == number
        ]
        assert fold(mine)["content"] == text
    prompt = len(served.engine.seen[0].prompt)
    assert body["usage"]["prompt_tokens"] == prompt and body["usage"]["completion_tokens"] == 24


def test_what_is_asked_reaches_the_engine(served: Served) -> None:
    served.says("x")
    served.post(CHAT, **PLAIN)
    plain = served.engine.seen[-1].options
    assert plain.sampler == Greedy() and plain.seed is None and plain.depth == "auto" and plain.max_tokens == -1
    served.post(
        CHAT, **PLAIN, temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, seed=-(2**40), depth=2, max_tokens=10**6,
        presence_penalty=1, frequency_penalty=0.5, repetition_penalty=1.1, repeat_last_n=9, logit_bias={"7": -5},
    )  # fmt: skip
    options = served.engine.seen[-1].options
    assert options.sampler == Sample(0.7, top_p=0.9, min_p=0.1, top_k=5) and options.depth == 2
    assert options.seed is not None and 0 <= options.seed < 2**32
    assert options.max_tokens == 1024 - len(served.engine.seen[-1].prompt), "more than the context holds is cut"
    penalties = options.penalties
    assert penalties is not None and penalties.bias == ((7, -5.0),)
    assert (penalties.presence, penalties.frequency, penalties.repetition) == (1.0, 0.5, 1.1)
    assert penalties.presence_context == penalties.frequency_context == penalties.repetition_context == 9


def test_a_seed_of_any_size_is_the_same_word_each_time(served: Served) -> None:
    seeds = [5, 2**32 - 1, 2**40 + 5, -1, -(2**63)]
    for seed in (*seeds, *seeds):
        served.post(CHAT, **PLAIN, seed=seed, max_tokens=1)
    folded = [request.options.seed for request in served.engine.seen]
    assert folded[: len(seeds)] == folded[len(seeds) :] and folded[:2] == seeds[:2]
    assert all(seed is not None and 0 <= seed < 2**32 for seed in folded)


def test_a_format_becomes_a_grammar(served: Served) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    for asked in (
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}},
        {"guided_json": schema},
        {"guided_regex": "[a-z]{1,3}"},
    ):
        served.post(CHAT, **PLAIN, **asked, max_tokens=1)
        assert served.engine.seen[-1].options.grammar is not None
    served.post(CHAT, **PLAIN, response_format={"type": "text"}, max_tokens=1)
    assert served.engine.seen[-1].options.grammar is None
    wrong = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "nothing"}}}
    served.refused(CHAT, **PLAIN, response_format=wrong)
    large = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"description": "x" * 5000}}}
    assert "4096 bytes" in served.refused(CHAT, **PLAIN, response_format=large)["message"]
    two = served.refused(CHAT, **PLAIN, response_format={"type": "json_object"}, guided_regex="a")
    assert "two formats" in two["message"]


def test_an_answer_in_a_format_is_one_and_may_still_be_a_call(served: Served) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [7, 8]}}, "required": ["a"], "additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    for depth in (0, 2):  # whatever a random model would rather say
        body = served.post(CHAT, **PLAIN, response_format=wanted, depth=depth, temperature=1.0, seed=0)
        assert json.loads(body["choices"][0]["message"]["content"]) in ({"a": 7}, {"a": 8})
    served.says(CALL)
    body = served.post(CHAT, **PLAIN, response_format=wanted, tools=[TOOL])
    assert body["choices"][0]["finish_reason"] == "tool_calls"


def test_a_call_that_is_asked_for_comes(served: Served) -> None:
    body = served.post(CHAT, **PLAIN, tools=[TOOL], tool_choice="required", temperature=1.0, seed=1, max_tokens=12)
    text = body["choices"][0]["message"]["content"] or ""
    assert text.startswith("<tool_call>\n<function=weather>") or body["choices"][0]["finish_reason"] == "tool_calls"


def test_a_prompt_that_is_too_long_is_told_in_words_that_clients_know(served: Served) -> None:
    error = served.refused(CHAT, messages=[{"role": "user", "content": "z! " * 600}])
    assert error["code"] == "context_length_exceeded" and "maximum context length" in error["message"]
    assert error["n_ctx"] == 1024 and str(error["n_prompt_tokens"]) in error["message"]
    with serving(context=40) as (client, engine):
        engine.script = "x"
        assert client.post(CHAT, json=PLAIN).status_code == 200
        assert engine.seen[-1].options.max_tokens == 40 - len(engine.seen[-1].prompt)
        long = client.post(CHAT, json={"messages": [{"role": "user", "content": "hello " * 30}]})
        assert long.status_code == 400 and "40 tokens" in long.json()["error"]["message"]


def test_the_next_turn_does_not_read_again_what_was_said(served: Served) -> None:
    first = served.says("Nice to meet you.").post(CHAT, **PLAIN)
    said = len(served.engine.seen[-1].prompt) + first["usage"]["completion_tokens"]
    turn = [*USER, {"role": "assistant", "content": "Nice to meet you."}, {"role": "user", "content": "And?"}]
    second = served.says("Well.").post(CHAT, messages=turn, reasoning_effort="none")
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert said - 2 <= cached < second["usage"]["prompt_tokens"]
    assert second["timings"]["cache_n"] == cached
    assert second["timings"]["prompt_n"] == second["usage"]["prompt_tokens"] - cached


def test_where_tokens_came_from_is_told_on_demand(served: Served) -> None:
    text = "One two three four five six seven eight nine."
    asked = PLAIN | {"prediction": {"type": "content", "content": text}, "show_drafts": True, "depth": 2}
    chunks = served.says(text).stream(CHAT, **asked)
    drafts = [pair for chunk in chunks for pair in chunk.get("drafts", ())]
    assert "".join(said for said, _ in drafts) == text
    assert {origin for _, origin in drafts} >= {"copied"}
    details = served.post(CHAT, **asked)["usage"]["completion_tokens_details"]
    assert details["accepted_prediction_tokens"] > 3 and details["rejected_prediction_tokens"] >= 0
    body = served.post(CHAT, **PLAIN, show_drafts=True, depth=0)
    assert {origin for _, origin in body["drafts"][0]} == {"plain"}
    assert body["usage"]["completion_tokens_details"]["accepted_prediction_tokens"] == 0


def test_thoughts_are_counted(served: Served) -> None:
    body = served.says("Hm, so.</think>Yes.").post(CHAT, messages=USER, reasoning_effort="low")
    thoughts = body["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert 2 < thoughts < body["usage"]["completion_tokens"] - 1
