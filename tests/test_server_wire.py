"""Bodies of requests: what is out of bounds or unknown is refused by name, what changes nothing is taken."""

from typing import Any

import pytest
from served import TOOL, USER, Served
from served import _shared as _shared
from served import served as served

from mtp_mlx.server.wire import IGNORED

CHAT = "/v1/chat/completions"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"foo": 1}, "foo"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content.0"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"repeat_penalty": 5e-324}, "repeat_penalty"),
        ({"repetition_penalty": 11}, "repetition_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"n": 9}, "n"),
        ({"n": 0}, "n"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": ["a" * 257]}, "stop.0"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"320": 1}}, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"seed": 2**64}, "seed"),
        ({"depth": -1}, "depth"),
        ({"depth": "deep"}, "depth"),
        ({"chat_template": "{{ x }}"}, "chat_template"),
        ({"functions": []}, "functions"),
        ({"modalities": ["audio"]}, "modalities.0"),
        ({"reasoning_effort": "huge"}, "reasoning_effort"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"tools": [{"type": "web_search"}]}, "tools.0"),
        ({"stream_options": {"include_obfuscation": True}, "stream": True}, "stream_options.include_obfuscation"),
    ],
)
def test_what_is_wrong_is_named(served: Served, body: dict[str, Any], param: str) -> None:
    error = served.refused(CHAT, **{"messages": USER} | body)
    assert error["param"] is not None and error["param"].startswith(param), error
    assert param.split(".")[0] in error["message"] or "token 320" in error["message"]
    assert not served.engine.seen, "nothing was asked of the engine"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"top_logprobs": 2}, "logprobs true"),
        ({"stream_options": {"include_usage": True}}, "stream true"),
        ({"max_tokens": 3, "max_completion_tokens": 3}, "mean the same"),
        ({"repeat_penalty": 1.1, "repetition_penalty": 1.1}, "mean the same"),
        ({"tools": [TOOL, TOOL]}, "two tools are called 'weather'"),
        ({"prediction": {"type": "content", "content": "x"}, "depth": 0}, "depth 0 allows none"),
        ({"chat_template_kwargs": {"messages": []}}, "messages"),
    ],
)
def test_what_contradicts_itself_is_refused(served: Served, body: dict[str, Any], words: str) -> None:
    message = served.refused(CHAT, **{"messages": USER} | body)["message"]
    assert words in message and "given {" not in message and "Hello" not in message


def test_what_changes_no_output_is_taken(served: Served) -> None:
    nothing = dict.fromkeys(IGNORED, "x")
    nulls = dict.fromkeys(("temperature", "stop", "tools", "seed", "n", "stream", "audio", "max_tokens", "functions"))
    kind: dict[str, Any] = {"parallel_tool_calls": True, "modalities": ["text"], "n": 1}
    served.says("x")
    asked = {"messages": USER, "reasoning_effort": "none"}
    plain = served.post(CHAT, **asked)["choices"]
    assert served.post(CHAT, **asked, **nothing, **nulls | kind)["choices"] == plain


def test_messages_are_taken_as_clients_send_them_back(served: Served) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Rome"}'}}
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}], "cache_control": {"type": "x"}},
        {"role": "user", "content": [{"type": "text", "text": "Rain"}, {"type": "text", "text": "?"}], "name": "Ann"},
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": [call], "reasoning_content": "Hm."},
        {"role": "tool", "tool_call_id": "call_1", "content": "dry"},
        {"role": "assistant", "content": "No.", "reasoning": "Dry.", "annotations": [], "function_call": None},
        {"role": "user", "content": "And there?"},
    ]
    served.says("Yes.")
    answer = served.post(CHAT, messages=messages, tools=[TOOL], reasoning_effort="none", depth=0)
    assert answer["choices"][0]["message"]["content"] == "Yes."


def test_numbers_that_json_does_not_know_are_refused(served: Served) -> None:
    for text in ('"temperature": NaN', '"logit_bias": {"5": Infinity}', '"top_p": 1e999'):
        body = f'{{"messages": [{{"role": "user", "content": "x"}}], {text}}}'
        answer = served.client.post(CHAT, content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400 and "error" in answer.json()
