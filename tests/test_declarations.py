"""Any schema becomes one whose every node has one type and a description, and what is dropped is said."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_mlx.declarations import plain_tool
from mtp_mlx.errors import RequestError


def _parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    tool = plain_tool({"type": "function", "function": {"name": "f", "parameters": parameters}})
    plain: dict[str, Any] = tool["function"]["parameters"]
    return plain


def _plain(node: Any, **root: Any) -> dict[str, Any]:
    """What becomes of one property."""
    found: dict[str, Any] = _parameters({"type": "object", "properties": {"a": node}, **root})["properties"]["a"]
    return found


def test_a_tool_has_a_description_and_an_object_of_parameters() -> None:
    assert plain_tool({"type": "function", "function": {"name": "f"}}) == {
        "type": "function",
        "function": {"name": "f", "description": "", "parameters": {"type": "object", "properties": {}}},
    }


def test_a_plain_node_stays_as_it_is() -> None:
    node = {"type": "string", "description": "its name", "enum": ["a", "b"]}
    assert _plain(node) == node
    assert _plain({"type": "string"}) == {"type": "string", "description": ""}


def test_of_several_types_one_is_told_and_the_others_described() -> None:
    assert _plain({"type": ["null", "string"]}) == {"type": "string", "description": "", "nullable": True}
    assert _plain({"type": ["integer", "string"], "description": "a port"}) == {
        "type": "integer",
        "description": "a port (or string)",
    }


def test_of_alternatives_one_is_told_and_the_others_described() -> None:
    node = {"anyOf": [{"type": "null"}, {"type": "string"}, {"type": "integer"}], "description": "which"}
    assert _plain(node) == {"type": "string", "nullable": True, "description": 'which (or {"type":"integer"})'}
    assert _plain({"oneOf": [{"type": "boolean"}, {"type": "null"}]})["type"] == "boolean"


def test_references_are_followed_and_may_go_in_circles() -> None:
    tree = {"type": "object", "properties": {"next": {"$ref": "#/$defs/tree"}}}
    assert _plain({"$ref": "#/$defs/a~1b"}, **{"$defs": {"a/b": {"type": "number"}}})["type"] == "number"
    assert _plain({"$ref": "#/$defs/tree"}, **{"$defs": {"tree": tree}})["properties"]["next"]["type"] == "object"
    assert _plain({"$ref": "#/$defs/x"}, **{"$defs": {"x": {"$ref": "#/$defs/x"}}})["type"] == "string"
    assert _plain({"$ref": "https://example.com/schema"})["type"] == "string"


def test_references_that_multiply_come_to_an_end() -> None:
    wide = {"type": "object", "properties": {name: {"$ref": "#/$defs/tree"} for name in "abcdefgh"}}
    members = _plain({"$ref": "#/$defs/tree"}, **{"$defs": {"tree": wide}})["properties"]
    assert sorted(members) == list("abcdefgh") and all(node["properties"] == {} for node in members.values())
    laughs = {
        f"{i}": {"type": "object", "properties": {name: {"$ref": f"#/$defs/{i + 1}"} for name in "abcdefgh"}}
        for i in range(10)
    }
    with pytest.raises(RequestError, match="parameters of tool f are more than 2000"):
        _plain({"$ref": "#/$defs/0"}, **{"$defs": laughs})


def test_what_is_nested_too_deeply_is_refused() -> None:
    node: dict[str, Any] = {}
    for _ in range(1500):
        node = {"type": "array", "items": node}
    with pytest.raises(RequestError, match="nested too deeply"):
        _plain(node)


def test_all_of_is_put_together() -> None:
    first = {"properties": {"a": {"type": "string"}}, "required": ["a"]}
    second = {"properties": {"b": {"type": "integer"}}, "required": ["b"]}
    plain = _plain({"allOf": [first, second]})
    assert sorted(plain["properties"]) == sorted(plain["required"]) == ["a", "b"]


def test_a_type_that_is_missing_is_told_from_the_rest() -> None:
    for node, kind in (
        ({"properties": {}}, "object"),
        ({"items": {}}, "array"),
        ({"const": "a"}, "string"),
        ({"enum": [1, 2]}, "integer"),
        ({}, "string"),
        (True, "string"),
    ):
        assert _plain(node)["type"] == kind
    assert _plain({"const": "a"})["enum"] == ["a"]


def test_values_that_templates_list_for_strings_only_are_described() -> None:
    assert _plain({"type": "integer", "enum": [1, 2]})["description"] == "(one of [1,2])"


def test_limits_are_described() -> None:
    node = {"type": "integer", "minimum": 1, "maximum": 9, "default": 3, "description": "how many"}
    assert _plain(node)["description"] == "how many (default 3, minimum 1, maximum 9)"


def test_what_is_required_but_not_there_is_left_out() -> None:
    parameters = {"type": "object", "properties": {"a": {}}, "required": ["a", "b"]}
    assert _parameters(parameters)["required"] == ["a"]


WORDS = ["type", "properties", "items", "anyOf", "allOf", "oneOf", "enum", "const", "required", "$ref", "description"]
schemas = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(["string", "object", "array", "null", "#", "#/items"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*WORDS, "a", "b"]), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(schemas)
def test_every_node_of_any_schema_is_plain(schema: Any) -> None:
    for node in _nodes(_parameters(schema if isinstance(schema, dict) else {"properties": {"a": schema}})):
        assert isinstance(node["type"], str) and isinstance(node.get("description", ""), str)
        assert node["type"] != "object" or isinstance(node["properties"], dict)
        assert node["type"] != "array" or isinstance(node["items"], dict)
        assert not {"anyOf", "oneOf", "allOf", "$ref"} & node.keys()


def _nodes(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield node
    for child in [*node.get("properties", {}).values(), *([node["items"]] if "items" in node else [])]:
        assert "description" in child
        yield from _nodes(child)
