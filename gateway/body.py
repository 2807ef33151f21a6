"""Reads a request's body: bounded in bytes and in values while it comes, then checked against its schema."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import from_json, to_json
from starlette.requests import Request

from .config import GatewayConfig
from .errors import ApiError, of_validation, place_of
from .fields import Strict

MAX_FAULTS = 1_000
"""Of a body with more faults none is told: only all of them can be had, and that takes seconds."""

MAX_UNKNOWN_NULLS = 16
"""How often unknown fields that hold null are looked for; each time finds all those of one kind of object."""

_M = TypeVar("_M", bound=Strict)


async def read(request: Request, model: type[_M], config: GatewayConfig) -> _M:
    """The body as `model`. Raises ApiError naming what is wrong with it."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise ApiError(415, f"content-type: expected application/json, got {kind[:80] or 'none'}", param="content-type")
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise ApiError(
            415, f"content-encoding: compressed bodies are not read, got {encoding[:80]}", param="content-encoding"
        )
    return parse((await _read_bytes(request, config)).removeprefix(codecs.BOM_UTF8), model)


def parse(body: bytes, model: type[_M]) -> _M:
    """Raises ApiError for what is no JSON, or none of this schema."""
    try:
        for _ in range(MAX_UNKNOWN_NULLS):
            try:
                return model.model_validate_json(body)
            except ValidationError as error:
                without = None if error.error_count() > MAX_FAULTS else _without_unknown_nulls(body, error)
                if without is None:
                    raise
                body = without
        return model.model_validate_json(body)
    except ValidationError as error:
        if error.error_count() > MAX_FAULTS:
            raise ApiError(
                400,
                f"the body has {error.error_count()} faults: fields that are not known here, or values of a wrong type",
                code="too_many_faults",
            ) from None
        raise of_validation(error) from error
    except RecursionError as error:
        raise ApiError(400, "the body is nested too deeply", code="invalid_json") from error


def _without_unknown_nulls(body: bytes, error: ValidationError) -> bytes | None:
    """The body without those fields that are not known and hold null, which programs send that write all the fields
    they know; None if there are none among the faults. Of a list only the first faulty item is told, so what is
    removed from one is removed from all: the next try finds something else."""
    faults = error.errors(include_url=False, include_context=False)
    found = [place_of(fault) for fault in faults if fault["type"] == "extra_forbidden" and fault["input"] is None]
    if not found:
        return None
    content = from_json(body)
    for *way, name in found:
        holders = [content]
        for part in way:
            holders = [inner for holder in holders for inner in _within(holder, part)]
        for holder in holders:
            if isinstance(holder, dict) and holder.get(str(name), 0) is None:
                del holder[str(name)]
    return to_json(content, inf_nan_mode="constants")


def _within(holder: Any, part: int | str) -> Iterable[Any]:
    if isinstance(holder, list):
        return holder if isinstance(part, int) else ()
    return (holder[part],) if isinstance(holder, dict) and part in holder else ()


async def _read_bytes(request: Request, config: GatewayConfig) -> bytes:
    """Raises ApiError 413 for a body that is over a limit. What is sent in vain is read all the same, up to twice the
    limit: a connection that is closed over unread bytes is reset, and its client never sees the answer."""
    limit = config.max_request_bytes
    declared = request.headers.get("content-length", "")
    length = int(declared[:20]) if declared.isdecimal() else 0
    fault = None
    if length > limit:
        fault = _too_large(f"the body has {length} bytes; the limit is {limit} bytes (--max-request-bytes)")
        if length > 2 * limit or "expect" in request.headers:  # who expects to be told sends nothing before
            raise fault
    body, values, size = bytearray(), ValueCount(), 0
    async for piece in request.stream():
        size += len(piece)
        if fault is None:
            body += piece
            values.add(piece)
            fault = _fault(size, values.count, config)
        elif size > 2 * limit:
            break
    if fault is not None:
        raise fault
    return bytes(body)


def _fault(size: int, values: int, config: GatewayConfig) -> ApiError | None:
    """What is wrong with a body of which so much has come."""
    if size > config.max_request_bytes:
        return _too_large(f"the body has more; the limit is {config.max_request_bytes} bytes (--max-request-bytes)")
    if values > config.max_request_values:
        return _too_large(
            f"the body has more than {config.max_request_values} numbers, texts, lists and objects, which is the limit "
            "(--max-request-values); a prompt that is one text counts as one"
        )
    return None


class ValueCount:
    """How many values JSON holds, counted in pieces as it comes, since a parser cannot be stopped at its first million.
    Nothing is checked: of what is no JSON the count means nothing, but is not below what a parser would build."""

    def __init__(self) -> None:
        self.count = 1
        """At most so many values; exact but for empty lists and objects, which count as two."""
        self._in_text = False
        self._escaped = False

    def add(self, piece: bytes) -> None:
        """The next piece, however the text was cut."""
        if self._escaped:
            piece = b"\\" + piece
        self._escaped = False
        if b"\\" in piece:
            piece = _ESCAPE.sub(b"", piece)
            if piece.endswith(b"\\"):
                piece, self._escaped = piece[:-1], True
        runs = piece.split(b'"')
        for run in runs[int(self._in_text) :: 2]:
            self.count += run.count(b",") + run.count(b"[") + run.count(b"{")
        self._in_text ^= len(runs) % 2 == 0


_ESCAPE = re.compile(rb"\\.", re.DOTALL)


def _too_large(why: str) -> ApiError:
    return ApiError(413, why, code="request_too_large", headers={"connection": "close"})
