"""Nothing that a schema asks for is left unenforced in silence."""

from typing import Any

import pytest

from mtp_mlx.errors import RequestError
from mtp_mlx.keywords import check_keywords


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"nullable": True, "type": "string"}, '"nullable" at # '),
        ({"properties": {"a": {"uniqueItems": True}}}, '"uniqueItems" at #/properties/a '),
        ({"x-guidance": {"lenient": True}}, '"x-guidance" at # '),
        ({"anyOf": [{"type": "string"}, {"if": {}}]}, '"if" at #/anyOf/1 '),
        ({"items": {"foo": 1}}, '"foo" at #/items '),
        ({"additionalProperties": {"foo": 1}}, '"foo" at #/additionalProperties '),
        ({"$defs": {"a": {"not": {}}}}, '"not" at #/$defs/a '),
        ({"prefixItems": [{"foo": 1}]}, '"foo" at #/prefixItems/0 '),
        ({"patternProperties": {"^a": {"foo": 1}}}, '"foo" at #/patternProperties/^a '),
        ({"items": [{"type": "string"}]}, '"prefixItems"'),
        ({"minimum": 1, "exclusiveMinimum": True}, '"exclusiveMinimum" at # is True'),
        ({"$ref": "#/examples/0", "examples": [{"nullable": True}]}, "leads to #/examples/0"),
    ],
)
def test_what_would_not_be_enforced_is_named_with_its_place(schema: dict[str, Any], named: str) -> None:
    with pytest.raises(RequestError, match=r"cannot be enforced|is a list|give the number|is no schema") as error:
        check_keywords(schema)
    assert named in str(error.value)


def test_remarks_private_keywords_and_names_of_members_are_no_restrictions() -> None:
    check_keywords(
        {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "title": "T",
            "x-order": 3,
            "properties": {"nullable": {"type": "string", "default": {"foo": 1}}, "b": {"$ref": "#/$defs/b"}},
            "$defs": {"b": {"const": {"foo": 2}, "examples": [{"not": 1}]}},
            "additionalProperties": False,
        }
    )


@pytest.mark.parametrize(
    "schema", [{"properties": 3}, {"anyOf": "a"}, {"items": 4}, {"$ref": 5}, {"properties": {"a": 1}}]
)
def test_a_wrong_form_is_left_to_the_compiler(schema: dict[str, Any]) -> None:
    check_keywords(schema)
