"""What the description at /openapi.json promises holds for whatever fits it, and for whatever does not."""

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.schemas import BaseSchema
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from test_server_run import running

from mtp_mlx.server.service import Defaults

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
KEY = {"authorization": "Bearer key"}


@pytest.fixture(scope="module")
def described() -> Iterator[BaseSchema]:
    with running(defaults=Defaults(max_tokens=2, depth=0)) as server:
        yield schemathesis.openapi.from_url(f"http://127.0.0.1:{server.port}/openapi.json", headers=KEY)


@pytest.mark.parametrize("mode", GenerationMode)
def test_every_answer_is_one_that_is_described(described: BaseSchema, mode: GenerationMode) -> None:
    asked = 0
    for found in described.get_all_operations():
        assert isinstance(found, Ok)
        operation = found.ok()
        if mode is GenerationMode.NEGATIVE and operation.method == "get":  # of which nothing can be wrong
            continue

        @settings(
            max_examples=4,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: Case[Any]) -> None:
            nonlocal asked
            asked += 1
            answer = case.call_and_validate(headers=KEY, checks=CHECKS, timeout=20)
            if answer.status_code >= 400:
                error = answer.json()["error"]
                assert error.keys() >= {"message", "type", "param", "code"} and error["message"]

        ask()
    assert asked > 20
