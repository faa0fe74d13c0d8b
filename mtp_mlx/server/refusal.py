"""What a client is told when it does not get what it asked for: a status and an error in OpenAI's shape."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from starlette.responses import JSONResponse

from mtp_mlx.errors import BusyError, CheckpointError, MTPError, RequestError

RETRY = {"Retry-After": "1"}
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "unavailable_error",
}
_SHOWN = 80  # characters of a wrong value that an error repeats


class RefusedError(Exception):
    """A request that is not served."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        extra: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.extra, self.headers = dict(extra or {}), dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error | self.extra}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


class Error(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | int | None


class ErrorBody(BaseModel):
    """The body of every answer that is an error."""

    error: Error


def refusal(error: MTPError) -> RefusedError:
    """What an error of ours means for a client."""
    match error:
        case BusyError():
            return RefusedError(503, str(error), code="unavailable", headers=RETRY)
        case RequestError():
            return RefusedError(400, str(error))
        case CheckpointError():
            return RefusedError(400, str(error), code="model_cannot")
        case _:
            return RefusedError(500, str(error))


def too_busy(error: BusyError) -> RefusedError:
    """For a request that found no place in the queue."""
    return RefusedError(429, str(error), code="rate_limit_exceeded", headers=RETRY)


def too_long(prompt: int, context: int) -> RefusedError:
    """For a prompt that leaves no room. Clients look for these words, and shorten what they send."""
    return RefusedError(
        400,
        f"this model's maximum context length is {context} tokens and the prompt has {prompt}; "
        f"shorten it to at most {context - 1}",
        code="context_length_exceeded",
        extra={"n_prompt_tokens": prompt, "n_ctx": context},
    )


def unfit(errors: Sequence[Mapping[str, Any]]) -> RefusedError:
    """For a body that does not fit its model. Of several errors the deepest is the one that was meant."""
    error = max(errors, key=lambda error: len(error["loc"]))
    where = ".".join(str(step) for step in error["loc"] if step != "body" and _is_name(step))
    if error["type"] == "extra_forbidden":
        message = f"{where} is not a field that this server knows; leave it out"
    elif error["type"] == "missing":
        message = f"{where or 'a body'} is missing"
    else:
        message = f"{where or 'the body'}: {_plain(error)}"
    return RefusedError(400, message, param=where or None)


def _plain(error: Mapping[str, Any]) -> str:
    if error["type"] == "value_error":  # our own words, which say what was given
        return str(error["msg"]).removeprefix("Value error, ")
    said = error["msg"]
    if error["type"] == "json_invalid":
        return f"this is not JSON: {error.get('ctx', {}).get('error', said)}"
    shown = repr(error.get("input"))
    return f"{said}, given {shown if len(shown) <= _SHOWN else shown[:_SHOWN] + '...'}"


def _is_name(step: int | str) -> bool:
    """Whether a step of a path is in the body, and no name of a type that was tried."""
    return isinstance(step, int) or bool(re.fullmatch(r"[a-z][a-z0-9_]*", step) and step not in ("str", "int", "bool"))


DOCUMENTED: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": words}
    for status, words in (
        (400, "The request cannot be served as it is"),
        (401, "The API key is missing or wrong"),
        (403, "This host or origin may not ask"),
        (404, "No such model"),
        (413, "The body is too large"),
        (415, "The body is not application/json"),
        (429, "Too many requests at a time"),
        (503, "The server is stopping"),
        ("4XX", "Any other error of the request"),
    )
}
