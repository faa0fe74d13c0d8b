"""Which keywords of a JSON schema a grammar enforces: what it would pass over in silence is refused.

llguidance passes over keywords that it does not know, and over some in an older draft's form. So they are looked at
first; what it knows and cannot do it refuses itself.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from mtp_mlx.errors import RequestError

_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("anyOf", "allOf", "oneOf", "prefixItems")
_NODES = ("additionalProperties", "items")
ENFORCED = {
    *_MAPS,
    *_LISTS,
    *_NODES,
    *("type", "enum", "const", "$ref", "required", "minProperties", "maxProperties", "minItems", "maxItems"),
    *("minLength", "maxLength", "pattern", "format", "multipleOf"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
}
# They say something about a value and restrict nothing.
REMARKS = {
    *("$schema", "$id", "$anchor", "$comment", "title", "description", "default", "example", "examples"),
    *("deprecated", "readOnly", "writeOnly", "contentEncoding", "contentMediaType", "discriminator"),
}
_INSTEAD = {
    "nullable": 'write "type": ["string", "null"] or an anyOf',
    "additionalItems": 'write "prefixItems" and "items"',
    "x-guidance": "its settings are not a client's",
}


def check_keywords(schema: Mapping[str, Any]) -> None:
    """Raises RequestError for a keyword that would not be enforced, and says where it stands."""
    for place, node in _nodes(schema):
        for keyword, value in node.items():
            _check(keyword, value, place)


def _check(keyword: str, value: object, place: str) -> None:
    if keyword not in ENFORCED | REMARKS and not _is_private(keyword):
        hint = _INSTEAD.get(keyword, "leave it out")
        raise RequestError(f'the JSON schema\'s "{keyword}" at {place} cannot be enforced; {hint}')
    if keyword == "items" and isinstance(value, list):
        raise RequestError(f'the JSON schema\'s "items" at {place} is a list; write "prefixItems"')
    if keyword == "$ref" and isinstance(value, str) and not _leads_to_a_schema(value):
        raise RequestError(f'the JSON schema\'s "$ref" at {place} leads to {value}, which is no schema; use "$defs"')
    if keyword in ("exclusiveMinimum", "exclusiveMaximum") and isinstance(value, bool):
        raise RequestError(f'the JSON schema\'s "{keyword}" at {place} is {value}; give the number itself')


def _leads_to_a_schema(reference: str) -> bool:
    """Whether it leads to where keywords have been looked at; what is outside of the document is left to others."""
    return not reference.startswith("#/") or reference.split("/")[1] in (*_MAPS, *_LISTS, *_NODES)


def _is_private(keyword: str) -> bool:
    return keyword.startswith("x-") and keyword != "x-guidance"


def _nodes(schema: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every schema within a schema, with its place. What has another form than it should have is left to others."""
    waiting: list[tuple[str, object]] = [("#", schema)]
    while waiting:
        place, node = waiting.pop()
        if not isinstance(node, Mapping):
            continue
        yield place, node
        for keyword in _MAPS:
            members = node.get(keyword)
            waiting += _below(f"{place}/{keyword}", members.items() if isinstance(members, Mapping) else ())
        for keyword in _LISTS:
            members = node.get(keyword)
            waiting += _below(f"{place}/{keyword}", enumerate(members) if isinstance(members, list) else ())
        waiting += _below(place, ((keyword, node.get(keyword)) for keyword in _NODES))


def _below(place: str, members: Any) -> list[tuple[str, object]]:
    return [(f"{place}/{name}", node) for name, node in members]
