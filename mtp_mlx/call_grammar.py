"""Calls of some tools as a grammar, in the syntax that a model's template writes. What it allows, tool_calls.py reads.

Arguments come in their schema's order, required ones always. Scalars and enums are held to their schema, objects and
lists to being JSON, or what Gemma writes for it; whoever runs a call checks the rest.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from mtp_mlx.dialects import Dialect
from mtp_mlx.errors import RequestError
from mtp_mlx.marks import Mark
from mtp_mlx.schemas import Schema
from mtp_mlx.tool_calls import Tools

_NAME = {"tags": re.compile(r"[^<>\s]{1,256}"), "braces": re.compile(r"[^{}\[\]:,\"'\s]{1,256}")}
_WORDS = {"null": '"null"', "boolean": '"true" | "false"', "integer": "INTEGER", "number": "NUMBER"}
_NUMBERS = r"""
INTEGER: /-?(0|[1-9][0-9]{0,18})/
NUMBER: /-?(0|[1-9][0-9]{0,18})(\.[0-9]{1,18})?([eE][+-]?[0-9]{1,3})?/
"""
# A value in tags is whatever stands before the first closing tag, which no value of a template's holds.
_TAGS = r"""
free_parameter: "<parameter=" KEY ">\n" text
text[lazy]: /(?s:.*)<\/parameter>/
KEY: /[A-Za-z_][A-Za-z0-9_\-]{0,63}/
object: %json {"type": "object", "x-guidance": {"whitespace_pattern": " |\\n {0,64}"}}
array: %json {"type": "array", "x-guidance": {"whitespace_pattern": " |\\n {0,64}"}}
"""
_BRACES = r"""
any: string | "null" | "true" | "false" | NUMBER | object | array
object: "{" (free_member ("," free_member)*)? "}"
array: "[" (any ("," any)*)? "]"
free_member: KEY ":" any
KEY: /[A-Za-z_][A-Za-z0-9_\-]{0,63}/
TEXT: /(?s:.+)/
"""


def call_grammar(dialect: Dialect, tools: Tools) -> str:
    """One call or more, in llguidance's variant of Lark. Raises RequestError for what the dialect cannot write."""
    if dialect.syntax == "none":
        raise RequestError("it is not known how this model writes a call; leave the choice of tools to it")
    if not tools:
        raise RequestError("a call is asked for and there are no tools; give at least one")
    writer = _Tags(dialect) if dialect.syntax == "tags" else _Braces(dialect)
    return "\n".join(writer.rules(tools))


@dataclass(frozen=True)
class _Writer:
    """What both syntaxes have in common."""

    dialect: Dialect

    def marker(self, mark: Mark) -> str:
        found = next(marker for marker in self.dialect.markers if marker.mark is mark)
        return _quoted(found.text) if found.id is None else f"<[{found.id}]>"

    def name(self, name: str, what: str) -> str:
        if not _NAME[self.dialect.syntax].fullmatch(name):
            raise RequestError(f"the {what} {name!r} cannot be written in this model's calls; use letters and digits")
        return name


@dataclass(frozen=True)
class _Tags(_Writer):
    """`<function=NAME>`, `<parameter=KEY>`, VALUE and closing tags, each on a line."""

    def rules(self, tools: Tools) -> Iterator[str]:
        opening, closing = self.marker(Mark.CALL_OPEN), self.marker(Mark.CALL_CLOSE)
        yield 'start: call ("\\n" call)*'
        yield f'call: {opening} "\\n" ({_either(f"tool{i}" for i in range(len(tools)))}) "\\n</function>\\n" {closing}'
        for i, (name, schema) in enumerate(tools.items()):
            head = _quoted(f"<function={self.name(name, 'tool')}>")
            yield f"tool{i}: {head} {self._parameters(schema)}"
        yield _NUMBERS + _TAGS

    def _parameters(self, schema: object) -> str:
        members = _members(schema)
        if not members:
            return '("\\n" free_parameter)*' if _open(schema) else ""
        return " ".join(self._parameter(member) for member in members)

    def _parameter(self, member: "_Member") -> str:
        opening = _quoted(f"\n<parameter={self.name(member.key, 'argument')}>\n")
        types, texts = member.schema.types, _texts(member.schema)
        if texts or (types and "string" not in types):
            values = [_quoted(text) for text in texts] or [_WORDS.get(name, name) for name in sorted(types)]
            value = f'({_either(values)}) "\\n</parameter>"'
        else:
            value = "text"
        return f"({opening} {value})" + ("" if member.required else "?")


@dataclass(frozen=True)
class _Braces(_Writer):
    """`call:NAME{key:value}`, with markers around texts."""

    def rules(self, tools: Tools) -> Iterator[str]:
        opening, closing, quote = (self.marker(mark) for mark in (Mark.CALL_OPEN, Mark.CALL_CLOSE, Mark.QUOTE))
        yield "start: call+"
        yield f'call: {opening} "call:" ({_either(f"tool{i}" for i in range(len(tools)))}) "}}" {closing}'
        for i, (name, schema) in enumerate(tools.items()):
            yield f"tool{i}: {_quoted(self.name(name, 'tool') + '{')} members{i}_0"
            yield from self._members(i, schema)
        yield f"string: {quote} TEXT? {quote}"
        yield _NUMBERS + _BRACES

    def _members(self, i: int, schema: object) -> Iterator[str]:
        """A rule for what may follow when the first n members are settled, and one for the same behind a member."""
        members = _members(schema)
        if not members and _open(schema):
            yield f'members{i}_0: (free_member ("," free_member)*)?'
            return
        for n, member in enumerate(members):
            pair = f"{_quoted(self.name(member.key, 'argument') + ':')} ({self._value(member.schema)})"
            for rule, comma in ("members", ""), ("more", '"," '):
                skipped = "" if member.required else f" | {rule}{i}_{n + 1}"
                yield f"{rule}{i}_{n}: {comma}{pair} more{i}_{n + 1}{skipped}"
        yield f'members{i}_{len(members)}: ""'
        yield f'more{i}_{len(members)}: ""'

    def _value(self, schema: Schema) -> str:
        texts = _texts(schema)
        if texts:
            quote = self.marker(Mark.QUOTE)
            return f"{quote} ({_either(map(_quoted, texts))}) {quote}"
        return _either(_WORDS.get(name, name) for name in sorted(schema.types)) or "any"


@dataclass(frozen=True)
class _Member:
    """An argument of a tool."""

    key: str
    schema: Schema
    required: bool


def _members(schema: object) -> list[_Member]:
    """The arguments that a schema names, in its order."""
    if not isinstance(schema, Mapping) or not isinstance(schema.get("properties"), Mapping):
        return []
    required = schema.get("required")
    names = required if isinstance(required, list) else []
    return [_Member(key, Schema(node, schema), key in names) for key, node in schema["properties"].items()]


def _open(schema: object) -> bool:
    """Whether arguments that the schema does not name are allowed."""
    return not isinstance(schema, Mapping) or schema.get("additionalProperties") is not False


def _texts(schema: Schema) -> list[str]:
    """The texts that an enum allows, if it allows nothing else."""
    node = schema.node
    values = node.get("enum", [node["const"]] if "const" in node else []) if isinstance(node, Mapping) else []
    return values if isinstance(values, list) and all(isinstance(value, str) and value for value in values) else []


def _either(rules: Iterable[str]) -> str:
    return " | ".join(rules)


def _quoted(text: str) -> str:
    return json.dumps(text)
