"""Messages of any client are read, and what cannot be read is named with its place."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from talks import WEATHER, answer, call, result, system, user

from mtp_mlx.errors import RequestError
from mtp_mlx.messages import read_messages, read_tools

PART = {"type": "text", "text": "a"}


def test_content_is_text_however_it_is_sent() -> None:
    parts = [PART, {"type": "input_text", "text": "b"}, {"type": "output_text", "text": "c"}]
    for content, expected in (("a", "a"), (None, ""), ([], ""), ([PART], "a"), (parts, "a\nb\nc")):
        for role in ("user", "assistant"):
            assert read_messages([{"role": role, "content": content}]) == [{"role": role, "content": expected}]
    assert read_messages([{"role": "user"}]) == [user("")]


def test_a_developer_is_the_system() -> None:
    assert read_messages([{"role": "developer", "content": [PART]}, user("b")]) == [system("a"), user("b")]


def test_billing_is_not_for_the_model() -> None:
    billing = "x-anthropic-billing-header: cc_version=2; cch=1f;"
    parts = [{"type": "text", "text": billing}, PART]
    assert read_messages([system(parts), system(billing), user(billing)]) == [system("a"), user(billing)]
    with pytest.raises(RequestError, match="nothing that a model may read"):
        read_messages([system(billing)])


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_has_both_names(name: str) -> None:
    (message,) = read_messages([answer("a", **{name: "because"})])
    assert message["reasoning"] == message["reasoning_content"] == "because"
    assert read_messages([answer("a", **{name: None})]) == [answer("a")]


@pytest.mark.parametrize("given", ['{"city": "Paris", "days": [1]}', {"city": "Paris", "days": [1]}])
def test_arguments_become_an_object(given: Any) -> None:
    (message,) = read_messages([answer(None, tool_calls=[call(given)])])
    assert message["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "Paris", "days": [1]}}


@pytest.mark.parametrize("given", [None, "", "{}"])
def test_a_call_may_have_no_arguments(given: Any) -> None:
    (message,) = read_messages([answer(None, tool_calls=[call(given)])])
    assert message["tool_calls"][0]["function"]["arguments"] == {}


def test_a_result_knows_the_tools_name() -> None:
    calls = [call("{}"), call("{}", name="clock", key="call_2")]
    read = read_messages([user("a"), answer("", tool_calls=calls), result([PART], "call_2"), result("b")])
    assert [message["name"] for message in read[2:]] == ["clock", "weather"]
    assert [message["content"] for message in read[2:]] == ["a", "b"]


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "messages is empty; give at least one"),
        ("hello", "messages is a text; give a list"),
        ({}, "messages is an object; give a list"),
        (None, "messages is null; give a list"),
        ([user("a"), "b"], r"messages\[1\] is a text; give an object"),
        ([user("a"), {"role": "robot"}], r"messages\[1\].role is 'robot'; use one of system, developer, user"),
        ([{"content": "a"}], r"messages\[0\].role is None"),
        ([{"role": ["user"]}], r"messages\[0\].role is \['user'\]"),
        ([{"role": "function", "content": "a"}], r"messages\[0\].role is 'function'; give tool_calls"),
        ([answer("", function_call={"name": "f"})], r"messages\[0\].function_call is no longer"),
        ([user(5)], r"messages\[0\].content is a number; give text"),
        ([user([PART, {"type": "image_url"}])], r"messages\[0\].content\[1\] is of type 'image_url', the model reads"),
        ([user([{"type": "input_audio"}])], "reads text only"),
        ([user([{"type": "file"}])], "reads text only"),
        ([user(["a"])], r"messages\[0\].content\[0\] has no type"),
        ([user([{"type": {}}])], r"messages\[0\].content\[0\] has no type"),
        ([user([{"type": "text", "text": None}])], r"messages\[0\].content\[0\].text is null"),
        ([user("a\ud800")], r"messages\[0\].content is not text that UTF-8"),
        ([user("a"), answer("", tool_calls={})], None),
        ([answer("", tool_calls={"a": 1})], r"messages\[0\].tool_calls is an object; give a list"),
        ([answer("", tool_calls=["a"])], r"messages\[0\].tool_calls\[0\] holds no function"),
        ([answer("", tool_calls=[call("{}", name="")])], r"tool_calls\[0\].function.name is ''"),
        ([answer("", tool_calls=[call("{}", key="")])], r"tool_calls\[0\].id is ''"),
        ([answer("", tool_calls=[call('{"a": ')])], r"tool_calls\[0\].function.arguments is not JSON: '\{\"a\": '"),
        ([answer("", tool_calls=[call("[1]")])], r"arguments is a list; give an object"),
        ([answer("", tool_calls=[call(DEEP)])], "arguments is not JSON"),
        ([answer("", tool_calls=[call('{"a": NaN}')])], "arguments is not JSON"),
        ([answer("", tool_calls=[call(3)])], "arguments is a number; give an object"),
        ([user("a"), result("b")], r"messages\[1\].tool_call_id is 'call_1', the latest calls before it are none"),
        ([answer("", tool_calls=[call("{}")]), result("b", "x")], "is 'x', the latest calls before it are call_1"),
        ([answer("", tool_calls=[call("{}")]), {"role": "tool", "content": "a"}], "tool_call_id is None"),
    ],
)
def test_what_cannot_be_read_is_named(messages: Any, words: str | None) -> None:
    if words is None:
        read_messages(messages)
        return
    with pytest.raises(RequestError, match=words) as raised:
        read_messages(messages)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 300


@pytest.mark.parametrize(
    ("tools", "words"),
    [
        ({}, "tools is an object; give a list"),
        (["f"], r"tools\[0\] is no function"),
        ([{"type": "web_search"}], r"tools\[0\] is no function"),
        ([{"type": "function", "name": "flat"}], r"tools\[0\] is no function"),
        ([WEATHER, {"type": "function", "function": {}}], r"tools\[1\].function.name is None"),
        ([{"function": {"name": "f", "parameters": []}}], r"tools\[0\].function.parameters is a list; give a JSON"),
    ],
)
def test_tools_that_are_none_are_named(tools: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        read_tools(tools)


def test_tools_stay_as_they_are() -> None:
    assert read_tools([WEATHER]) == [WEATHER]
    assert read_tools([{"function": {"name": "f", "parameters": None}}]) == [
        {"type": "function", "function": {"name": "f"}}
    ]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["user", "assistant", "tool"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "tool_calls", "function", "name", "id", "arguments"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(json_values)
def test_whatever_comes_is_read_or_refused(value: Any) -> None:
    for read in (read_messages, read_tools):
        try:
            read(value)
        except RequestError:
            continue
