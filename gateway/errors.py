"""What goes wrong, as OpenAI's API says it: a status and `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import json
import math
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from starlette.responses import Response

from ..protocol.errors import (
    OVER_CONTEXT,
    ConfigurationError,
    InvalidRequest,
    Overloaded,
    RequestCancelled,
    RequestTimeout,
    ServiceUnavailable,
    TandemError,
)

RETRY_AFTER_S = 1
CLIENT_CLOSED_REQUEST = 499
LONGEST_VALUE = 100
UNSUPPORTED = "unsupported_field"
"""The code of what is refused because this server, or its model, has no such thing."""


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """Every answer that is no success."""

    error: ErrorDetail


class ApiError(Exception):
    """An answer that is no success. `param` is the field that was wrong; `retry_after` is in seconds."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["retry-after"] = str(max(1, math.ceil(retry_after)))
        self.body = {"error": {"message": message, "type": kind, "param": param or None, "code": code}}

    def response(self) -> Response:
        return Response(to_json(self.body), self.status, self.headers, "application/json")


def to_json(value: Any) -> bytes:
    """ASCII: what a client sent and an error repeats may hold anything."""
    return json.dumps(value, separators=(",", ":")).encode()


def refused(field: str, why: str, *, code: str | None = None) -> ApiError:
    """A request that cannot be, by the field that makes it so."""
    return ApiError(400, f"{field}: {why}", param=field, code=code)


def unavailable(why: str, retry_after: float = RETRY_AFTER_S) -> ApiError:
    return ApiError(503, why, kind="server_error", code="service_unavailable", retry_after=retry_after)


def as_api_error(error: Exception) -> ApiError:
    """The answer that an exception of the SDK deserves. What is none of its exceptions is ours to mend: 500."""
    match error:
        case ApiError():
            return error
        case InvalidRequest():
            return ApiError(400, str(error), param=error.field, code=code_of(error))
        case Overloaded():
            return ApiError(429, str(error), kind="rate_limit_error", code="overloaded", retry_after=error.retry_after)
        case ServiceUnavailable():
            return unavailable(str(error))
        case RequestCancelled():
            return unavailable(f"the request was ended by the server: {error}")
        case RequestTimeout():
            return ApiError(504, str(error), kind="server_error", code="timeout")
        case ConfigurationError():  # the model lacks what the request needs: a tokenizer, a chat template
            return ApiError(400, str(error))
        case TandemError():
            return ApiError(500, str(error), kind="server_error", code="internal_error")
    return ApiError(
        500, "an error of the server's own; its log has the story", kind="server_error", code="internal_error"
    )


def code_of(error: InvalidRequest) -> str | None:
    """What OpenAI's API calls it, if programs look for that."""
    return "context_length_exceeded" if OVER_CONTEXT in str(error) else None


def of_validation(error: ValidationError) -> ApiError:
    """The first fault of a body, with the field, what it may be and what it was."""
    faults = error.errors(include_url=False, include_context=True)
    first = _most_telling(faults)
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['ctx'].get('error', first['msg'])}", code="invalid_json")
    field = ".".join(str(part) for part in place_of(first))
    # Programs that send all the fields that they know send null for what they do not want.
    if first["type"] in ("extra_forbidden", "none_required") or (
        first["type"] == "too_long" and first["ctx"]["max_length"] == 0
    ):
        what_to_do = _INSTEAD.get(field, "leave it out")
        return ApiError(400, f"{field}: this field is not supported here; {what_to_do}", param=field, code=UNSUPPORTED)
    if first["type"] == "missing":
        return ApiError(400, f"{field}: this field is needed", param=field, code="missing_field")
    message = _IN_JSON.get(first["type"]) or first["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if first["type"] == "literal_error" and first["ctx"]["expected"] in ("True", "False"):
        message = message.lower()  # as JSON writes them
        if field in _INSTEAD:
            message = f"{message}: {_INSTEAD[field]}"
    shown = _shown(first["input"])
    return ApiError(400, f"{field or 'the body'}: {message}, got {shown}", param=field)


_IN_JSON = {
    "model_type": "input should be an object",
    "dict_type": "input should be an object",
    "list_type": "input should be a valid array",
}
"""Where pydantic speaks of Python's types, though what it looked at was JSON."""

_INSTEAD = {
    "store": "nothing is stored here",
    "background": "nothing is stored here, so that an answer could be fetched later",
    "previous_response_id": "nothing is stored here: send the conversation so far as input",
    "conversation": "nothing is stored here: send the conversation so far as input",
}
"""What to do about a field that leaving out is not enough for."""


def _most_telling(faults: list[ErrorDetails]) -> ErrorDetails:
    """Of a field that may be one of several types, and fails once for each, the type that fitted farthest."""
    first = place_of(faults[0])
    return max(
        (fault for fault in faults if place_of(fault)[: len(first)] == first),
        key=lambda fault: (len(place_of(fault)), not fault["type"].endswith("_type")),
    )


def place_of(fault: ErrorDetails) -> list[int | str]:
    """Without the names of types, which are no part of where a field is. The name of a field that is not known may look
    like one."""
    where = fault["loc"]
    end = len(where) - (fault["type"] == "extra_forbidden")
    return [part for part in where[:end] if not (isinstance(part, str) and _names_a_type(part))] + list(where[end:])


def _names_a_type(part: str) -> bool:
    return "[" in part or part in ("str", "int", "float", "bool") or part[:1].isupper()


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}…"
