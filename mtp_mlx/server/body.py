"""What every body has to be before anything reads it: UTF-8, not nested too deeply, and text that can be encoded."""

import json
import re

from mtp_mlx.server.refusal import RefusedError

_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_BRACKET = re.compile(rb"[\[\]{}]")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def check_body(body: bytes, nesting: int) -> None:
    """Raises RefusedError for what would break whoever reads it. What is no JSON at all is left to the parser."""
    try:
        body.decode()
    except UnicodeDecodeError as error:
        raise RefusedError(400, f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
    if _depth(body, nesting) > nesting:
        raise RefusedError(400, f"the body's JSON is nested more than {nesting} deep; make it flatter")
    if _SURROGATE.search(body):
        _check_surrogates(body)


def _depth(body: bytes, most: int) -> int:
    """How deeply the brackets are nested, or `most` + 1 where they are deeper."""
    depth = deepest = 0
    for bracket in _BRACKET.finditer(_STRING.sub(b"", body)):
        depth += 1 if bracket[0] in b"[{" else -1
        deepest = max(deepest, depth)
        if deepest > most:
            break
    return deepest


def _check_surrogates(body: bytes) -> None:
    try:
        json.dumps(json.loads(body), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RefusedError(
            400, "the body has half of a surrogate pair, which is no text; send whole characters"
        ) from None
    except ValueError:  # the parser will say it
        return
