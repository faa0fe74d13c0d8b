"""What every body has to be before anything reads it: UTF-8, not nested too deeply, and JSON that means one thing."""

import json
import math
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from mtp_mlx.server.refusal import RefusedError

_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_BRACKET = re.compile(rb"[\[\]{}]")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def check_body(body: bytes, nesting: int) -> None:
    """Raises RefusedError for what would break whoever reads it. What is no JSON at all is left to the parser."""
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RefusedError(400, f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
    if "\0" in text:  # parsers take UTF-16 and UTF-32 too, which hide brackets
        raise RefusedError(400, f"the body is not JSON in UTF-8: a zero at byte {body.index(0)}")
    if _depth(body, nesting) > nesting:
        raise RefusedError(400, f"the body's JSON is nested more than {nesting} deep; make it flatter")
    try:
        given = json.loads(text, parse_constant=_no_number, parse_float=_finite, object_pairs_hook=_distinct)
    except ValueError:  # the parser will say it
        return
    if _SURROGATE.search(body):
        _check_surrogates(given)


def _depth(body: bytes, most: int) -> int:
    """How deeply the brackets are nested, or `most` + 1 where they are deeper."""
    depth = deepest = 0
    for bracket in _BRACKET.finditer(_STRING.sub(b"", body)):
        depth += 1 if bracket[0] in b"[{" else -1
        deepest = max(deepest, depth)
        if deepest > most:
            break
    return deepest


def _no_number(name: str) -> NoReturn:
    raise RefusedError(400, f"the body holds {name}, which is not JSON; send a number or null")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise RefusedError(400, f"the body holds the number {digits[:40]}, which is too large; numbers end at 1.8e308")
    return number


def _distinct(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object, unless a key is in it twice: which of the two was meant nobody knows."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RefusedError(400, f"the body holds the key {twice[:80]!r} twice in one object; send it once")
    return made


def _check_surrogates(given: object) -> None:
    try:
        json.dumps(given, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RefusedError(
            400, "the body has half of a surrogate pair, which is no text; send whole characters"
        ) from None
