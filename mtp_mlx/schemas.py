"""What a tool's JSON schema says about an argument, and text -> JSON by it. Numbers stay text: none loses a digit."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

_NULLS = ("null", "None")
_BOOLEANS = {"true": "true", "True": "true", "false": "false", "False": "false"}
_YES_AND_NO = {"true": "true", "yes": "true", "on": "true", "1": "true"} | {
    "false": "false",
    "no": "false",
    "off": "false",
    "0": "false",
}
_NUMBER = re.compile(r"\+?(-?)0*((?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)", re.ASCII)
_WHOLE = re.compile(r"(-?[0-9]+)\.0+", re.ASCII)
_OF_VALUE = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}


@dataclass(frozen=True)
class Schema:
    """A node of a JSON schema; whatever a client may have sent, so nothing about its form is taken for granted."""

    node: object = None
    root: object = None

    @cached_property
    def types(self) -> frozenset[str]:
        """The JSON types that are allowed; empty where nothing is said."""
        return frozenset(name for node in self._nodes(self.node) for name in _types(node))

    def member(self, key: str) -> "Schema":
        """The schema of an object's member."""
        for node in self._nodes(self.node):
            properties = node.get("properties")
            if isinstance(properties, Mapping) and key in properties:
                return Schema(properties[key], self.root)
        return self._first("additionalProperties")

    @cached_property
    def item(self) -> "Schema":
        """The schema of an array's items."""
        return self._first("items")

    def _first(self, keyword: str) -> "Schema":
        found = (node[keyword] for node in self._nodes(self.node) if isinstance(node.get(keyword), Mapping))
        return Schema(next(found, None), self.root)

    def _nodes(self, node: object) -> Iterator[Mapping[str, object]]:
        """The node, with what it refers to and its alternatives; each once, for references may go in circles."""
        waiting, seen = [node], set[int]()
        while waiting:
            node = waiting.pop()
            if not isinstance(node, Mapping) or id(node) in seen:
                continue
            seen.add(id(node))
            yield node
            waiting.append(self._referred(node.get("$ref")))
            for keyword in ("anyOf", "oneOf", "allOf"):
                alternatives = node.get(keyword)
                waiting += reversed(alternatives) if isinstance(alternatives, list) else ()

    def _referred(self, reference: object) -> object:
        if not isinstance(reference, str) or not reference.startswith("#/"):
            return None
        node = self.root
        for part in reference[2:].split("/"):
            node = node.get(part) if isinstance(node, Mapping) else None
        return node


def _types(node: Mapping[str, object]) -> list[str]:
    named = node.get("type")
    if isinstance(named, str):
        return [named.lower()]
    if isinstance(named, list):
        return [name.lower() for name in named if isinstance(name, str)]
    values = node.get("enum", [node["const"]] if "const" in node else [])
    return [_OF_VALUE[type(value)] for value in values if type(value) in _OF_VALUE] if isinstance(values, list) else []


def quoted(text: str) -> str:
    """A text as a JSON string."""
    return json.dumps(text, ensure_ascii=False)


def scalar(text: str, types: frozenset[str]) -> str | None:
    """The JSON for a null, a boolean or a number, where the text is one that the types allow; else None."""
    word = text.strip()
    if word in _NULLS and (not types or "null" in types):
        return "null"
    if word in _BOOLEANS and (not types or "boolean" in types):
        return _BOOLEANS[word]
    number = _number(word, types) if not types or types & {"integer", "number"} else None
    if number is not None:
        return number
    # No other reading is allowed, so these words cannot be meant as text.
    return _YES_AND_NO.get(word.lower()) if "boolean" in types and "string" not in types else None


def _number(word: str, types: frozenset[str]) -> str | None:
    found = _NUMBER.fullmatch(word)
    if found is None:
        return None
    number = found[1] + found[2]
    if not types or "string" in types:
        return number if number == word else None  # 007 may be a name
    integral = _WHOLE.fullmatch(number) if "number" not in types else None
    return integral[1] if integral else number


Held = Literal["no", "short", "all"]


def held(types: frozenset[str]) -> Held:
    """How much of a text has to be known before its first character can go out as JSON."""
    if types == {"string"}:
        return "no"
    return "short" if types == {"string", "null"} else "all"
