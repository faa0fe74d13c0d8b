"""A call in its family's syntax -> name and arguments; every form that other parsers have tripped over."""

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replies import GEMMA, QWEN, Piece, Said, cut, gemma_call, pieces, qwen_call, say

from mtp_mlx.dialects import Dialect

settings.register_profile("calls", max_examples=150, deadline=None, derandomize=True, database=None)
settings.load_profile("calls")


def properties(**of: object) -> dict[str, object]:
    return {"type": "object", "properties": of}


STRING = {"type": "string"}


def gemma(body: str, schema: object = None) -> Any:
    """The arguments of `call:f{BODY}`."""
    return arguments(say(GEMMA, f"<|tool_call>call:f{{{body}}}<tool_call|>", {"f": schema}))


def qwen(value: str, schema: object = None) -> Any:
    """What a parameter with this raw text is read as."""
    text = f"<tool_call>\n<function=f>\n<parameter=x>\n{value}\n</parameter>\n</function>\n</tool_call>"
    return arguments(say(QWEN, text, {"f": properties(x=schema)}))["x"]


def arguments(said: Said) -> Any:
    assert said.content == said.reasoning == "" and said.names == ["f"]
    return said.calls[0][1]


def text_of(said: Said) -> str:
    """What came out where no call did."""
    assert said.calls == [] and said.finish_reason == "stop"
    return said.content


# braces


@pytest.mark.parametrize("key", ["@timestamp", "a-b", "a.b", "Basic LLM Chain", "$ref", "ключ", "'", "a'b", "1"])
def test_a_bare_key_may_hold_anything_but_the_syntax(key: str) -> None:
    if key == "'":
        assert text_of(say(GEMMA, "<|tool_call>call:f{':1}<tool_call|>", {"f": {}})).startswith("<|tool_call>")
    else:
        assert gemma(f'{key}:1,b:{{{key}:<|"|>x<|"|>}}') == {key: 1, "b": {key: "x"}}


def test_keys_may_be_quoted() -> None:
    assert gemma('<|"|>a:b<|"|>:1,"c\\u00e9\\"":2,\'d\':3') == {"a:b": 1, 'cé"': 2, "d": 3}


@pytest.mark.parametrize("name", ["a.b", "server/tool", "google:mcp:create-pdf-file", "tool_1", "Ünïcode"])
def test_a_tools_name_may_hold_anything_but_the_syntax(name: str) -> None:
    assert say(GEMMA, f"<|tool_call>call:{name}{{a:1}}<tool_call|>").calls == [(name, {"a": 1})]
    text = f"<tool_call>\n<function={name}>\n</function>\n</tool_call>"
    assert say(QWEN, text).calls == [(name, {})]


def test_bare_words_are_text_and_commas_may_have_spaces() -> None:
    assert gemma("unit:celsius, mode: very fast ,url:http://x.y/?a=b") == {
        "unit": "celsius",
        "mode": "very fast",
        "url": "http://x.y/?a=b",
    }


@pytest.mark.parametrize("word", ["None", "null", " null "])
def test_nothing_is_null_even_where_text_is_wanted(word: str) -> None:
    assert gemma(f"a:{word}") == {"a": None}
    assert gemma(f"a:{word}", properties(a=STRING)) == {"a": None}


def test_words_are_read_by_the_schema() -> None:
    schema = properties(zip=STRING, on={"type": "boolean"}, n={"type": "INTEGER"}, list={"items": STRING})
    read = gemma("zip:01234,on:True,n:5.0,list:[1,true],free:[1,true,01]", schema)
    assert read == {"zip": "01234", "on": True, "n": 5, "list": ["1", "true"], "free": [1, True, "01"]}


@pytest.mark.parametrize(
    "text",
    ["x:", "a:1,b:2", "}{", "]}],[", '"', "'", '"a":"b"', "\\", "\\n", "\n\t", "\u2028", "é🙂", "", "call:f{}", "//"],
)
def test_text_between_quotes_is_taken_as_it_is(text: str) -> None:
    assert gemma(f'a:<|"|>{text}<|"|>,b:[<|"|>{text}<|"|>]') == {"a": text, "b": [text]}


def test_text_in_other_quotes() -> None:
    assert gemma(r'a:"x\n\"}\u00e9\q",b:' + r"'it's, {fine}\' \n'") == {"a": 'x\n"}é\\q', "b": "it's, {fine}' \n"}


def test_commas_may_be_missing_or_too_many() -> None:
    assert gemma('a:<|"|>x<|"|>b:90,,c:{d:[1,2,],},') == {"a": "x", "b": 90, "c": {"d": [1, 2]}}


def test_white_space_may_stand_anywhere() -> None:
    text = '<|tool_call> call: f {\n  a : [ 1 , { b : <|"|> c <|"|> } ]\n}\n<tool_call|>'
    assert say(GEMMA, text).calls == [("f", {"a": [1, {"b": " c "}]})]


@pytest.mark.parametrize("number", ["9007199254740993", "1e999", "-0.10", "1E+5", "9" * 5000])
def test_numbers_keep_every_digit(number: str) -> None:
    for said in (
        say(GEMMA, f"<|tool_call>call:f{{x:{number}}}<tool_call|>", {"f": {}}),
        say(QWEN, f"<tool_call><function=f><parameter=x>\n{number}\n</parameter></function></tool_call>", {"f": {}}),
    ):
        if len(number) > 4096 and said.content:
            assert said.ended == []  # a bare word of that size is none
        else:
            assert said.fragments == [f'{{"x":{number}}}'] and said.ended == [0]


def test_several_calls_in_one_block_and_blocks_that_are_not_closed() -> None:
    for text in (
        "<|tool_call>call:f{a:1}call:g{}<tool_call|>",
        "<|tool_call>call:f{a:1}<|tool_call>call:g{}",
        "<|tool_call>call:f{a:1}\n<|tool_call>call:g{}<tool_call|>",
    ):
        said = say(GEMMA, text)
        assert said.calls == [("f", {"a": 1}), ("g", {})] and said.content == ""


def test_surplus_behind_a_call_is_text_but_its_closing_marker_is_not() -> None:
    said = say(GEMMA, "<|tool_call>call:f{a:1}} and<tool_call|>\nmore")
    assert said.calls == [("f", {"a": 1})] and said.content == "} andmore"


@pytest.mark.parametrize(
    "body",
    [
        "call:f{a}",
        "call:f{a:}",
        "call:f{a:[1}}",
        "call:f{:1}",
        "call:f(a=1)\n",
        "f{a:1}",
        "call:{}",
        "",
        "{}",
        "call:\nf{}",
        "call:f{a:1",
        'call:f{a:<|"|>x',
        'call:f{a:x<|"|>y<|"|>}',
        "call:f{a:" + "x" * 5000 + "}",
        "call:f{a:" + "[" * 200 + "]" * 200 + "}",
    ],
)
def test_what_is_no_call_comes_back_as_text(body: str) -> None:
    text = f"<|tool_call>{body}<tool_call|>"
    for stream in (pieces(GEMMA, text), cut(pieces(GEMMA, text), 1)):
        assert text_of(say(GEMMA, stream)) == text


# tags


@pytest.mark.parametrize(
    "text", ["null", "None", "true", "12", "1e5", "[1]", '{"a": 1}', '"x"', "", " x ", "\n", "\n\nx\n"]
)
def test_a_text_stays_text_by_its_schema(text: str) -> None:
    assert qwen(text, STRING) == text
    assert qwen(text, {"enum": ["a", "b"]}) == text
    assert qwen(text, {"$ref": "#/nowhere", "anyOf": [STRING, 3]}) == text


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("null", {}, None),
        ("None", {}, None),
        ("True", {}, True),
        ("007", {}, "007"),
        ("[draft]", {}, "[draft]"),
        ('{"a": [1, null]}', {}, {"a": [1, None]}),
        ("hello", {}, "hello"),
        ("null", {"type": ["string", "null"]}, None),
        ("nullify all of it", {"type": ["string", "null"]}, "nullify all of it"),
        ("None", {"anyOf": [STRING, {"type": "null"}]}, None),
        ("yes", {"type": "boolean"}, True),
        ("No", {"type": "boolean"}, False),
        ("maybe", {"type": "boolean"}, "maybe"),
        ("+007", {"type": "integer"}, 7),
        ("5.0", {"type": "integer"}, 5),
        ("5.0", {"type": "number"}, 5.0),
        ("NaN", {"type": "number"}, "NaN"),
        ("twelve", {"type": "integer"}, "twelve"),
        ("{'a': True, 'b': [None, 'it''s']}", {"type": "object"}, {"a": True, "b": [None, "it''s"]}),
        ("{a: x}", {"type": "object"}, {"a": "x"}),
        ("{a: x", {"type": "object"}, "{a: x"),
        ("[1, 2] or so", {"type": "array"}, "[1, 2] or so"),
        ('{"a": 1}', {"type": ["string", "object"]}, {"a": 1}),
        ("{a: 1}", {"type": ["string", "object"]}, "{a: 1}"),
        ("3", {"type": ["integer", "string"]}, 3),
        ("b", {"const": "b"}, "b"),
    ],
)
def test_a_value_is_read_by_its_schema(text: str, schema: object, value: object) -> None:
    read = qwen(text, schema)
    assert read == value and type(read) is type(value)


def test_references_are_followed_and_circles_end() -> None:
    schema = {**properties(x={"$ref": "#/$defs/T"}), "$defs": {"T": {"anyOf": [{"$ref": "#/$defs/T"}, STRING]}}}
    text = "<tool_call><function=f><parameter=x>\n1\n</parameter></function></tool_call>"
    assert arguments(say(QWEN, text, {"f": schema})) == {"x": "1"}
    assert arguments(say(QWEN, text, {"f": {"additionalProperties": STRING}})) == {"x": "1"}
    many = properties(x={"anyOf": [{"$ref": "#/properties/x"}] * 1000 + [STRING]})
    assert arguments(say(QWEN, text, {"f": many})) == {"x": "1"}
    for strange in (3, {"properties": 3}, properties(x=[3]), properties(x={"type": [3], "enum": 3, "anyOf": 3})):
        assert arguments(say(QWEN, text, {"f": strange})) == {"x": 1}


@pytest.mark.parametrize(
    "text",
    [
        "a </parameter> b",
        "</parameter>",
        "<parameter=y>\nz\n",
        "</function>",
        "<function=g>",
        "a < b <= c <para </par",
        "{<|}",
        "say </tool_call> and <tool_call> too",
        "<tool_call>\n<function=g>\n<parameter=y>\n1\n</parameter>\n</function>\n</tool_call>\nlike this",
        "\n\n  indented\n\n",
    ],
)
def test_a_text_may_hold_the_syntax_itself(text: str) -> None:
    if text == "</parameter>":  # indistinguishable from an end that was written twice
        assert qwen(text, STRING) == ""
    else:
        assert qwen(text, STRING) == text


BLOCKS = {
    "two functions": "<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n<function=g>\n</function>\n",
    "a function not closed before the next": "<function=f><parameter=a>\n1\n</parameter>\n<function=g></function>",
    "two functions, none closed": "<function=f>\n<parameter=a>\n1\n</parameter>\n<function=g>\n",
    "every end twice": "<function=f><parameter=a>1</parameter></parameter></function></function>\n<function=g>\n",
}


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_two_functions_in_a_block_are_two_calls(block: str) -> None:
    said = say(QWEN, f"<tool_call>\n{block}</tool_call>\nmore")
    assert said.calls == [("f", {"a": 1}), ("g", {})] and said.content == "more"


@pytest.mark.parametrize(
    "body",
    [
        "<parameter=x>\na\n</parameter>\n</function>\n",
        "<parameter=x>\na</parameter>\n</function>\n",
        "<parameter=x>a</parameter></function>",
        "<parameter=x>\na\n</parameter>\n</parameter>\n</function>\n",
        "<parameter=x>\na\n</parameter>\n",
        "<parameter=x>\na\n</function>\n",
        "<parameter=x>\na\n</parameter>\n</function></function>\n",
    ],
)
@pytest.mark.parametrize("end", ["</tool_call>", ""])
def test_a_call_with_forgotten_or_doubled_ends_is_a_call(body: str, end: str) -> None:
    text = f"<tool_call>\n<function=f>\n{body}{end}"
    assert arguments(say(QWEN, text, {"f": properties(x=STRING)})) == {"x": "a"}
    two = say(QWEN, f"<tool_call>\n<function=f>\n{body}</tool_call>\n<tool_call>\n<function=f>\n{body}</tool_call>")
    assert two.calls == [("f", {"x": "a"})] * 2


def test_a_call_cut_off_behind_an_argument_is_none() -> None:
    for end in ("", "\n</parameter>\n"):
        text = f"<tool_call>\n<function=f>\n<parameter=x>\na\n</parameter>{end}"
        said = say(QWEN, text, reason="length")
        assert said.calls == [] and said.content == text and said.finish_reason == "length"


@pytest.mark.parametrize("size", [1, 4, 100])
def test_only_the_broken_call_of_a_block_comes_back(size: int) -> None:
    said = say(GEMMA, cut(pieces(GEMMA, "<|tool_call>call:f{a:1} call:g{b"), size))
    assert said.calls == [("f", {"a": 1})] and said.content == " call:g{b"
    first = "<tool_call><function=f><parameter=a>1</parameter></function>"
    said = say(QWEN, cut(pieces(QWEN, f"{first}<function=g><parameter=a>\n2"), size))
    assert said.calls == [("f", {"a": 1})] and said.content == "<function=g><parameter=a>\n2"


@pytest.mark.parametrize(
    "body",
    [
        "prose",
        "",
        "<function=>\n</function>\n",
        "<function=f>\nprose</function>",
        "<parameter=x>\n1\n</parameter>",
        "<function=f>\n<parameter=x>\n1\n",
        '{"name": "f"}',
        '{"name": "f", "arguments": [1]}',
        '{"name": "f", "arguments": {"a": 1e999}}',
        '{"name": "f", "arguments": {"a": ' + "[" * 20000 + "}}",
        "{",
    ],
)
def test_what_is_no_call_of_tags_comes_back_as_text(body: str) -> None:
    text = f"<tool_call>\n{body}</tool_call>"
    assert text_of(say(QWEN, text)) == text


def test_a_call_may_be_one_json_object() -> None:
    call = {"name": "f", "arguments": {"a": [1, None, "é</tool>"], "n": 9007199254740993}}
    for end in ("\n</tool_call>", ""):
        assert say(QWEN, f"<tool_call>\n{json.dumps(call)}{end}").calls == [("f", call["arguments"])]


def test_a_call_that_is_begun_anew_does_not_take_the_next_one_along() -> None:
    said = say(QWEN, '<tool_call>{"name": or <tool_call>\n<function=f>\n</function>\n</tool_call>')
    assert said.calls == [("f", {})] and said.content == '<tool_call>{"name": or '


# there and back


KEYS = st.text(
    st.characters(exclude_characters=":,{}[]<>\n", exclude_categories=["Cs", "Z", "Cc"]), min_size=1, max_size=8
)
BARE_KEYS = KEYS.filter(lambda key: key[0] not in "'\"")
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=20)
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(BARE_KEYS, inner, max_size=3), max_leaves=8
)
ARGUMENTS = st.dictionaries(BARE_KEYS, VALUES, max_size=4)


def _chopped(stream: list[Piece], data: st.DataObject) -> list[Piece]:
    return cut(stream, data.draw(st.integers(1, 9)))


@given(ARGUMENTS, st.data())
def test_arguments_written_as_gemma_writes_them_come_back(
    given_arguments: dict[str, object], data: st.DataObject
) -> None:
    said = say(GEMMA, _chopped(gemma_call("f", given_arguments), data))
    assert said.calls == [("f", given_arguments)] and said.content == ""


def _schema_of(value: object) -> dict[str, str]:
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return {"type": names.get(type(value), "null")}


@given(ARGUMENTS, st.data())
def test_arguments_written_as_qwen_writes_them_come_back(
    given_arguments: dict[str, object], data: st.DataObject
) -> None:
    schema = properties(**{key: _schema_of(value) for key, value in given_arguments.items()})
    said = say(QWEN, _chopped(qwen_call("f", given_arguments), data), {"f": schema})
    assert said.calls == [("f", given_arguments)] and said.content == ""


# samples from the published pages and templates


def test_published_samples() -> None:
    call = '<|tool_call>call:get_current_temperature{location:<|"|>London<|"|>}<tool_call|><|tool_response>'
    said = say(GEMMA, f"<|channel>thought\n...\n<channel|>{call}")
    assert said.calls == [("get_current_temperature", {"location": "London"})]
    assert (said.reasoning, said.content, said.finish_reason) == ("...", "", "tool_calls")
    text = "</think>\n\nLet me check.\n\n<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n"
    said = say(QWEN, f"\n\n{text}</function>\n</tool_call>", thinking=True)
    assert said.calls == [("get_weather", {"city": "Paris"})]
    assert (said.reasoning, said.content) == ("", "Let me check.")


# hostile input


N = 20000
HOSTILE: list[tuple[Dialect, str]] = [
    (GEMMA, "<|tool_call>call:f{a:" + "[" * N),
    (GEMMA, "<|tool_call>call:f{a:" + "{a:" * N),
    (GEMMA, "<|tool_call>call:f{a:" + "[],{}" * N),
    (GEMMA, "<|tool_call>call:f{a:[" + "1," * N),
    (GEMMA, "<|tool_call>call:f{" + "," * N),
    (GEMMA, "<|tool_call>call:f{a:'" + "' " * N),
    (GEMMA, '<|tool_call>call:f{a:"' + "\\" * N),
    (GEMMA, "<|tool_call>call:f{a:" + " " * N),
    (GEMMA, "<|tool_call>call:f{" + "x" * N),
    (GEMMA, "<|tool_call>" + " " * N),
    (GEMMA, "<|tool_call>" * (N // 10)),
    (GEMMA, "<|channel>thought\n" * (N // 10)),
    (GEMMA, '<|tool_call>call:f{a:<|"|>' + '<|"|><|"|>' * (N // 10)),
    (QWEN, "<tool_call>\n<function=f>\n<parameter=x>\n" + "</parameter>\n" * (N // 4)),
    (QWEN, "<tool_call>\n<function=f>\n<parameter=x>\n" + "</parameter> a" * (N // 4)),
    (QWEN, "<tool_call>\n<function=f>\n<parameter=x>\n</parameter>" + "\n" * N),
    (QWEN, "<tool_call>\n<function=f>\n<parameter=x>\n" + "<" * N),
    (QWEN, "<tool_call>\n<function=f>\n<parameter=x>\n" + "[" * N + "</parameter></function></tool_call>"),
    (QWEN, "<tool_call>\n<function=f>\n<parameter=x>\n" + "0" * N + "</parameter></function></tool_call>"),
    (QWEN, "<tool_call>\n<function=f>\n" + "<parameter=" * (N // 4)),
    (QWEN, "<tool_call><function=f></function>" * (N // 10)),
    (QWEN, "\n" * N + "a" + "\n" * N),
]


@pytest.mark.parametrize(("family", "text"), HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_input_takes_linear_time(family: Dialect, text: str) -> None:
    stream = pieces(family, text)
    for size in (4, len(text)):
        began = time.process_time()
        say(family, cut(stream, size))
        assert time.process_time() - began < 1.5  # quadratic time is ten times as much
