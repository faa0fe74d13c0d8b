"""What a model's markers are: a frozen value per tokenizer. Families are data, in `dialects.toml`."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

from mtp_mlx.marks import Mark, Marker

Syntax = Literal["none", "braces", "tags"]


@dataclass(frozen=True)
class Dialect:
    """The markers of a model and how it writes a call.

    `syntax` "braces" is `call:NAME{key:value}`, "tags" is `<function=NAME><parameter=KEY>VALUE`. `title` follows an
    opening marker of reasoning. A generation has to end at a token of `stops`, whatever the checkpoint's own stops are.
    """

    name: str = "plain"
    syntax: Syntax = "none"
    markers: tuple[Marker, ...] = ()
    title: str = ""
    stops: frozenset[int] = field(default_factory=frozenset)


PLAIN = Dialect()


def find_dialect(vocabulary: Mapping[str, int]) -> Dialect:
    """The dialect whose markers a vocabulary (text -> id) holds; `PLAIN`, which marks nothing, where it holds none.

    One known marker is enough: those that the vocabulary lacks are then looked for in the text.
    """
    for entry in _families():
        if any(marker in vocabulary for marker in entry["known_by"]):
            return _dialect(entry, vocabulary)
    return PLAIN


def _dialect(entry: Mapping[str, Any], vocabulary: Mapping[str, int]) -> Dialect:
    spelled = {mark: entry[mark.name.lower()] for mark in Mark if mark.name.lower() in entry}
    markers = [Marker(mark, text, vocabulary.get(text)) for mark, text in spelled.items()]
    markers += [Marker(Mark.STOP, text, vocabulary.get(text)) for text in entry.get("stops", ())]
    stops = frozenset(marker.id for marker in markers if marker.mark is Mark.STOP and marker.id is not None)
    return Dialect(entry["name"], cast(Syntax, entry["syntax"]), tuple(markers), entry.get("title", ""), stops)


@cache
def _families() -> list[dict[str, Any]]:
    return cast(
        list[dict[str, Any]], tomllib.loads(Path(__file__).with_name("dialects.toml").read_text("utf-8"))["dialects"]
    )
