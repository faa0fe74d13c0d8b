"""The log has one line for each request: numbers, and no text of anybody's."""

import logging

import pytest
from served import USER, Served
from served import _shared as _shared
from served import served as served

from mtp_mlx.server.ledger import Account, line


def test_a_request_is_one_line_of_numbers(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "mtp_mlx.server.ledger"):
        served.says("Answer").post("/v1/chat/completions", messages=USER, reasoning_effort="none", depth=0)
        served.client.get("/nothing")
    first, second = (record.getMessage() for record in caplog.records)
    assert "POST /v1/chat/completions 200 ok" in first and "prompt " in first and "generated " in first
    assert "tokens/s, accepted 0 of 0 drafts" in first
    assert "Hello" not in first and "Answer" not in first
    assert "GET /nothing 404 refused" in second


def test_a_path_cannot_write_lines_of_its_own() -> None:
    told = line(Account(status=404), "GET", "/a\nreq_1 POST / 200\r\x1b[2J\u2028b\u202ecba" + "x" * 500, 0.1)
    assert told.count("\n") == 0 and "\r" not in told and "\x1b" not in told and not {"\u2028", "\u202e"} & set(told)
    assert len(told) < 250


def test_what_became_of_a_request_has_a_name() -> None:
    outcomes = {status: Account(status=status).outcome for status in (200, 404, 499, 500, 503)}
    assert outcomes == {200: "ok", 404: "refused", 499: "cancelled", 500: "error", 503: "error"}
    assert Account(status=200, failed=True).outcome == "error"
