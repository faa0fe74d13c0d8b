"""What a body has to be before it is read: brackets count outside of strings only, half characters are none."""

import json

import pytest

from mtp_mlx.server.body import check_body
from mtp_mlx.server.refusal import RefusedError


def test_brackets_count_as_deep_as_they_are() -> None:
    for depth in (1, 7, 8):
        check_body(b"[" * depth + b"]" * depth, 8)
        check_body(b'{"a":' * depth + b"1" + b"}" * depth, 8)
    check_body(b"[" + b",".join([b"[[]]"] * 50) + b"]", 8)
    for deep in (b"[" * 9 + b"]" * 9, b"[" * 10**6, b'[{"a":' * 5):
        with pytest.raises(RefusedError, match="more than 8 deep"):
            check_body(deep, 8)


def test_brackets_in_strings_do_not_count() -> None:
    for text in ("[" * 99, '\\"' + "[" * 99, "\\\\", '"[[[[[[[[[[[[', "\\"):
        check_body(json.dumps({"a": text, "b": [text]}).encode(), 3)
    check_body(b'{"a": "never closed [[[[[[[[[[[', 300)


def test_half_characters_are_refused_and_whole_ones_are_not() -> None:
    check_body(b'{"a": "\\ud83d\\ude00"}', 8)
    check_body(b'{"a": "\\\\ud83d"}', 8)
    check_body(b'{"a": \\ud83d}', 8)  # no JSON: the parser says so
    for body in (b'{"a": "\\ud83d"}', b'{"\\ude00": 1}', b'["\\ud83dx\\ude00"]'):
        with pytest.raises(RefusedError, match="surrogate"):
            check_body(body, 8)
    with pytest.raises(RefusedError, match="UTF-8"):
        check_body(b'{"a": "\xe9"}', 8)


@pytest.mark.parametrize("code", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
def test_other_encodings_are_refused_though_parsers_know_them(code: str) -> None:
    with pytest.raises(RefusedError, match="UTF-8"):
        check_body('{"a": "\u2200", "b": [[]]}'.encode(code), 8)
    check_body(b'\xef\xbb\xbf{"a": 1}', 8)


@pytest.mark.parametrize("text", ["NaN", "-Infinity", "Infinity", "1e999", "-1e309", "9" * 400 + ".0"])
def test_numbers_that_nobody_can_hold_are_refused_wherever_they_stand(text: str) -> None:
    for body in (f'{{"a": [{{"b": {text}}}]}}', f"\ufeff[{text}]"):
        with pytest.raises(RefusedError, match=r"too large|not JSON"):
            check_body(body.encode(), 8)
    check_body(json.dumps({"a": text, "b": [1e308, -5e-324, 10**400]}).encode(), 8)


def test_a_key_that_is_there_twice_is_named() -> None:
    with pytest.raises(RefusedError, match="'b' twice"):
        check_body(b'{"a": [{"b": 1, "c": 2, "\\u0062": 3}]}', 8)
    check_body(b'[{"b": 1}, {"b": 2}, {"a": {"b": 3}, "b": 4}]', 8)
