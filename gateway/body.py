"""Reads a request's body: bounded in bytes and in values while it comes, then checked against its schema."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import from_json
from starlette.requests import Request

from .chat_schema import MAX_MESSAGES, MAX_TOOLS, ChatRequest, Message, TextPart, Tool, ToolCall
from .config import GatewayConfig
from .errors import ApiError, of_validation, place_of
from .fields import Strict
from .responses_schema import MAX_ITEMS, InputItem, ResponsesRequest, ResponseTool
from .tokenizing import TokenizeRequest
from .turns import Turns

MAX_FAULTS = 1_000
"""Of a body with more faults none is told: only all of them can be had, and that takes seconds."""

MANY_VALUES = 1_024
"""A body with so many values or more is validated in pieces, between which others are served: its parts first."""

TRIES = 3
"""How often what holds unknown fields that are null is validated: all of them are told at once, but for those of lists,
whose items are validated one by one."""

_M = TypeVar("_M", bound=Strict)


async def read(request: Request, model: type[_M], config: GatewayConfig, turns: Turns) -> _M:
    """The body as `model`. Raises ApiError naming what is wrong with it."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise ApiError(415, f"content-type: expected application/json, got {kind[:80] or 'none'}", param="content-type")
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise ApiError(
            415, f"content-encoding: compressed bodies are not read, got {encoding[:80]}", param="content-encoding"
        )
    body, values = await _read_bytes(request, config)
    return await parse(body.removeprefix(codecs.BOM_UTF8), model, values, turns)


async def parse(body: bytes, model: type[_M], values: int, turns: Turns) -> _M:
    """The body, of so many values. Raises ApiError for what is no JSON, or none of this schema."""
    try:
        if values < MANY_VALUES or model not in PARTS:
            try:
                return model.model_validate_json(body)
            except ValidationError as error:
                nulls = _unknown_nulls(error)
                content = _content(body) if nulls else None
                if content is None or not _remove(nulls, content):
                    raise
        else:
            content = _content(body)
            if content is None:
                return model.model_validate_json(body)  # raises what is wrong with it
        for _ in range(TRIES - 1):
            try:
                return model.model_validate(await _prepared(content, model, turns))
            except ValidationError as error:
                if not _remove(_unknown_nulls(error), content):
                    raise
        return model.model_validate(await _prepared(content, model, turns))
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


def _content(body: bytes) -> Any:
    """What JSON says; None for what is no object."""
    try:
        content = from_json(body)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


async def _prepared(content: dict[str, Any], model: type[Strict], turns: Turns) -> dict[str, Any]:
    """The same, with what its long lists hold validated before the whole is, in many short pieces. A list ends where it
    has a fault: the validation of the whole tells of that, and nothing after it."""
    found = dict(content)
    await turns.take(_prepare(found, PARTS.get(model, {})))
    return found


def _prepare(holder: dict[str, Any], parts: Mapping[str, Part]) -> Iterator[None]:
    """Replaces lists by such in which parts stand for their JSON, in steps. Raises ValidationError for a part with too
    many faults to find them all once more."""
    for name, part in parts.items():
        items = holder.get(name)
        if not isinstance(items, list) or (part.most is not None and len(items) > part.most):
            continue
        made: list[Any] = []
        for i, item in enumerate(items):
            inner = item
            if part.inner and isinstance(item, dict):
                inner = dict(item)
                yield from _prepare(inner, part.inner)
            try:
                made.append(_validated(part.adapter, inner))
            except ValidationError as error:
                if error.error_count() > MAX_FAULTS:
                    raise
                made.append(inner)
                break
            items[i] = made[-1]
            yield
        holder[name] = made


def _validated(adapter: TypeAdapter[Any], item: Any) -> Any:
    for _ in range(TRIES - 1):
        try:
            return adapter.validate_python(item)
        except ValidationError as error:
            if not _remove(_unknown_nulls(error), item):
                raise
    return adapter.validate_python(item)


@dataclass(frozen=True, slots=True)
class Part:
    """What a list of a body holds."""

    adapter: TypeAdapter[Any]
    most: int | None = None
    """Of a list with more items nothing is validated before the whole is."""
    inner: Mapping[str, Part] = field(default_factory=dict)
    """Lists within each item, by their fields."""


_TEXTS = Part(TypeAdapter(TextPart))
_MESSAGES = Part(
    TypeAdapter(Message), MAX_MESSAGES, {"content": _TEXTS, "tool_calls": Part(TypeAdapter(ToolCall), MAX_TOOLS)}
)
_TOOLS = Part(TypeAdapter(Tool), MAX_TOOLS)
PARTS: dict[type[BaseModel], dict[str, Part]] = {
    ChatRequest: {"messages": _MESSAGES, "tools": _TOOLS},
    TokenizeRequest: {"messages": _MESSAGES, "tools": _TOOLS},
    ResponsesRequest: {
        "input": Part(TypeAdapter(InputItem), MAX_ITEMS, {"content": _TEXTS, "output": _TEXTS}),
        "tools": Part(TypeAdapter(ResponseTool), MAX_TOOLS),
    },
}
"""Lists of objects, which take long to validate. Token ids do not."""


def _unknown_nulls(error: ValidationError) -> list[list[int | str]]:
    """Where fields are that are not known and hold null, which programs send that write all the fields they know."""
    if error.error_count() > MAX_FAULTS:
        return []
    faults = error.errors(include_url=False, include_context=False)
    return [place_of(fault) for fault in faults if fault["type"] == "extra_forbidden" and fault["input"] is None]


def _remove(nulls: Iterable[list[int | str]], content: Any) -> bool:
    """Whether any was there."""
    removed = False
    for *way, name in nulls:
        holder = content
        for part in way:
            holder = _within(holder, part)
        if isinstance(holder, dict) and holder.get(name, 0) is None:
            del holder[name]
            removed = True
    return removed


def _within(holder: Any, part: int | str) -> Any:
    if isinstance(holder, list):
        return holder[part] if isinstance(part, int) and part < len(holder) else None
    return holder.get(part) if isinstance(holder, dict) else None


async def _read_bytes(request: Request, config: GatewayConfig) -> tuple[bytes, int]:
    """The body, and how many values it has at most. Raises ApiError 413 for one that is over a limit. What is sent in
    vain is read all the same, up to twice the limit: a connection that is closed over unread bytes is reset, and its
    client never sees the answer."""
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
    return bytes(body), values.count


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
