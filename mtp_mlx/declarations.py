"""A tool's declaration in the few words of JSON schema that a template can spell by itself.

Some templates write a schema out word by word. They take for granted that every node has one type and a description,
and know nothing of alternatives and references; what they would drop is said in the description instead.
"""

import json
from collections.abc import Mapping
from typing import Any

from mtp_mlx.errors import RequestError

_OF_VALUE = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    list: "array",
    dict: "object",
    type(None): "null",
}
_DEEPEST = 16  # references and alternatives within one node
_SAID = {"type", "description"}  # of what a reference leads back to
_MOST = 2000  # nodes of a tool; references may multiply them
_ALTERNATIVES = ("anyOf", "oneOf")
# Said in the description, since there is no other place for it.
_REMARKS = ("format", "pattern", "default", "minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems")


def plain_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A tool whose parameters are an object of plain nodes. Raises RequestError for too many."""
    function = tool["function"]
    parameters = function.get("parameters") or {}
    try:
        plain = _Schema(function["name"], parameters).object(parameters)
    except RecursionError:
        raise RequestError(f"the parameters of tool {function['name']} are nested too deeply; simplify them") from None
    described = {"name": function["name"], "description": _text(function.get("description")), "parameters": plain}
    return {"type": "function", "function": described}


class _Schema:
    """A schema, to whose root references lead. One that leads back to where it stands is not followed again."""

    def __init__(self, name: str, root: Mapping[str, Any]):
        self._name = name
        self._root = root
        self._count = 0

    def object(self, node: Mapping[str, Any], seen: frozenset[str] = frozenset()) -> dict[str, Any]:
        """The node of an object. A template may expect the properties to be there."""
        node, seen = self._resolved(node, seen)
        properties = node.get("properties")
        members = properties if isinstance(properties, Mapping) else {}
        required = node.get("required")
        names = [name for name in required if name in members] if isinstance(required, list) else []
        plain = {str(name): self._node(member, seen) for name, member in members.items()}
        return {"type": "object", "properties": plain} | ({"required": names} if names else {})

    def _node(self, given: Any, seen: frozenset[str]) -> dict[str, Any]:
        self._count += 1
        if self._count > _MOST:
            raise RequestError(
                f"the parameters of tool {self._name} are more than {_MOST}, references included; simplify its schema"
            )
        node, seen = self._resolved(given if isinstance(given, Mapping) else {}, seen)
        kinds = _types(node)
        kind = next((name for name in kinds if name != "null"), "string")
        plain: dict[str, Any] = {"type": kind, "description": _described(node, kinds)}
        if "null" in kinds or node.get("nullable") is True:
            plain["nullable"] = True
        if values := _values(node):
            plain["enum"] = values
        if kind == "object":
            plain |= self.object(node, seen)
        if kind == "array":
            plain["items"] = self._node(node.get("items"), seen)
        return plain

    def _resolved(self, node: Mapping[str, Any], seen: frozenset[str]) -> tuple[dict[str, Any], frozenset[str]]:
        """A node with what it refers to, all of `allOf`, and the first of its alternatives that is not null; and the
        references that led there."""
        merged = dict(node)
        for _ in range(_DEEPEST):
            if "$ref" in merged:
                reference = str(merged.pop("$ref"))
                target = self._target(reference)
                merged = ({key: target[key] for key in _SAID & target.keys()} if reference in seen else target) | merged
                seen |= {reference}
            elif "allOf" in merged:
                for part in _mappings(merged.pop("allOf")):
                    merged = _joined(merged, part)
            elif keyword := next((word for word in _ALTERNATIVES if word in merged), None):
                merged = self._chosen(merged, _mappings(merged.pop(keyword)))
            else:
                break
        return merged, seen

    def _chosen(self, node: dict[str, Any], alternatives: list[Mapping[str, Any]]) -> dict[str, Any]:
        real = [choice for choice in alternatives if choice.get("type") != "null"]
        node = dict(real[0] if real else {}) | node
        if len(real) < len(alternatives):
            node["nullable"] = True
        if len(real) > 1:
            node["description"] = _sentence(node.get("description"), "or " + " or ".join(map(_compact, real[1:])))
        return node

    def _target(self, reference: str) -> dict[str, Any]:
        """What a reference within the schema leads to; nothing where it leads elsewhere."""
        if not reference.startswith("#"):
            return {}
        node: Any = self._root
        for step in reference.removeprefix("#").split("/")[1:]:
            node = node.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(node, Mapping) else None
        return dict(node) if isinstance(node, Mapping) else {}


def _types(node: Mapping[str, Any]) -> list[str]:
    """The types of a node, told by its other words where it does not say."""
    given = node.get("type")
    if isinstance(given, str):
        return [given]
    if isinstance(given, list) and (named := [name for name in given if isinstance(name, str)]):
        return named
    if values := _values(node):
        return list(dict.fromkeys(_OF_VALUE.get(type(value), "object") for value in values))
    if "properties" in node:
        return ["object"]
    return ["array"] if "items" in node else ["string"]


def _values(node: Mapping[str, Any]) -> list[Any]:
    """The values that are allowed, where they are listed."""
    listed = node.get("enum", [node["const"]] if "const" in node else [])
    return listed if isinstance(listed, list) else []


def _described(node: Mapping[str, Any], kinds: list[str]) -> str:
    real = [kind for kind in kinds if kind != "null"]
    remarks = [f"{name} {_compact(node[name])}" for name in _REMARKS if name in node]
    remarks += ["or " + " or ".join(real[1:])] if len(real) > 1 else []
    if "string" not in real[:1] and (values := _values(node)):
        remarks.append(f"one of {_compact(values)}")  # templates list values of strings only
    return _sentence(node.get("description"), ", ".join(remarks))


def _sentence(description: Any, remark: str) -> str:
    text = _text(description)
    return f"{text} ({remark})".strip() if remark else text


def _joined(left: dict[str, Any], right: Mapping[str, Any]) -> dict[str, Any]:
    """Both nodes, with the properties and requirements of either."""
    joined = dict(right) | left
    if isinstance(left.get("properties"), Mapping) and isinstance(right.get("properties"), Mapping):
        joined["properties"] = {**right["properties"], **left["properties"]}
    if isinstance(left.get("required"), list) and isinstance(right.get("required"), list):
        joined["required"] = [*right["required"], *left["required"]]
    return joined


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
