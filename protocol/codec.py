"""Messages as bytes: msgpack `[class name, {field: value}]`, fields at their default left out, columns as little-endian
bytes.

Decoding trusts nothing: the size is limited before unpacking, every container before it is allocated, and all
containers of a message together (20 MB of empty arrays would unpack to 1.4 GB); then each field is checked against its
declared type.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from operator import attrgetter
from typing import Any, get_type_hints

import msgpack
import numpy as np
from pydantic import TypeAdapter, ValidationError

from . import messages
from .errors import MessageTooLarge, ProtocolError, VersionMismatch
from .sampling import SamplingParams
from .structured import StructuredOutputsParams

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""No message is sent or taken over this size."""
MAX_SUBMISSION_BYTES = 8 * 1024 * 1024
"""No client's message is: a prompt of two million tokens, less the rest."""
MAX_ELEMENTS = 200_000
"""Maps and arrays that one message may hold in all, each counted with its elements."""
MAX_CONTAINER_LENGTH = 65_536
MAX_STRING_BYTES = 64 * 1024

_COLUMN_DTYPES: dict[Any, np.dtype[Any]] = {
    messages.Ints: np.dtype("<i4"),
    messages.Longs: np.dtype("<i8"),
    messages.Floats: np.dtype("<f4"),
}

_FieldPlan = tuple[str, Any, Any, Callable[[Any], Any]]
"""A field's name, its default and that as msgpack takes it (MISSING if it has none), and what turns its value into what
msgpack takes."""


def encode(message: object) -> bytes:
    """The bytes of a message. Raises MessageTooLarge over MAX_MESSAGE_BYTES (a Submit: MAX_SUBMISSION_BYTES), and
    TypeError where a column has another dtype than its field."""
    data: bytes = msgpack.packb([type(message).__name__, _to_map(message)], use_bin_type=True)
    limit = MAX_SUBMISSION_BYTES if isinstance(message, messages.Submit) else MAX_MESSAGE_BYTES
    if len(data) > limit:
        raise MessageTooLarge(f"{type(message).__name__} of {len(data)} bytes is over the limit of {limit}")
    return data


_pack_tokens = msgpack.Packer(use_bin_type=True).pack


def encode_tokens(epoch: int, ticket: bytes, offset: bytes, count: bytes, token: bytes) -> bytes:
    """What `encode` makes of a Tokens message without endings, from its columns as they travel. A scheduler sends
    thousands of these a second, and this takes a quarter of the time."""
    columns = {"epoch": epoch, "ticket": ticket, "offset": offset, "count": count, "token": token}
    data: bytes = _pack_tokens(("Tokens", columns))
    return data


def decode(data: bytes, *expected: type) -> Any:
    """The message that `data` holds, one of the `expected` classes.

    Columns are read-only. Raises ProtocolError for anything else: too large, no msgpack, unknown or
    unexpected class, a field that is missing, unknown, or of another type.
    """
    if len(data) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"a message of {len(data)} bytes is over the limit of {MAX_MESSAGE_BYTES}")
    elements = 0

    def count(container: Any) -> Any:
        nonlocal elements
        elements += 1 + len(container)
        if elements > MAX_ELEMENTS:
            raise ValueError(f"over {MAX_ELEMENTS} maps, arrays and elements of them in one message")
        return container

    try:
        unpacked = msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            use_list=False,
            list_hook=count,
            object_hook=count,
            max_str_len=MAX_STRING_BYTES,
            max_bin_len=len(data),
            max_array_len=MAX_CONTAINER_LENGTH,
            max_map_len=MAX_CONTAINER_LENGTH,
            max_ext_len=0,
        )
    except (ValueError, msgpack.exceptions.UnpackException, RecursionError) as error:
        raise ProtocolError(f"not a message: {error or type(error).__name__}") from error
    if not isinstance(unpacked, tuple) or len(unpacked) != 2 or not isinstance(unpacked[0], str):
        raise ProtocolError("not a message: expected [class name, fields]")
    name, values = unpacked
    for cls in expected:
        if cls.__name__ == name:
            _refuse_other_version(cls, values)
            try:
                return _adapter(cls).validate_python(values)
            except ValidationError as error:
                first = error.errors(include_url=False, include_input=False)[0]
                where = ".".join(str(part) for part in first["loc"])
                raise ProtocolError(f"{name}.{where[:100]}: {first['msg']}"[:400]) from error
    raise ProtocolError(
        f"unexpected message {name[:64]!r}; expected one of {', '.join(cls.__name__ for cls in expected)}"
    )


@cache
def _adapter(cls: type) -> TypeAdapter[Any]:
    """Made when a process first decodes such a message: making all of them takes a tenth of a second."""
    return TypeAdapter(cls)


def _refuse_other_version(cls: type, values: Any) -> None:
    """Before the fields are checked: another version's greeting may have other fields."""
    if any(name == "version" for name, *_ in _PLANS[cls][0]) and isinstance(values, dict):
        version = values.get("version")
        if version != messages.PROTOCOL_VERSION:
            raise VersionMismatch(
                f"the peer speaks protocol version {version!r:.20}, this end speaks {messages.PROTOCOL_VERSION}; "
                "install the same version of tandem at both ends"
            )


def _to_map(message: object) -> dict[str, Any]:
    out = {}
    plan, values_of = _PLANS[type(message)]
    for (name, default, packed_default, pack), value in zip(plan, values_of(message), strict=True):
        if value is not default:
            packed = pack(value)
            if packed or packed_default is MISSING or packed != packed_default:
                out[name] = packed
    return out


def _column_packer(dtype: np.dtype[Any]) -> Callable[[Any], bytes]:
    def pack(value: Any) -> bytes:
        if value.dtype is not dtype and value.dtype != dtype:
            raise TypeError(f"a column of {dtype.name} cannot take {value.dtype.name}")
        packed: bytes = value.tobytes()
        return packed

    return pack


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return _to_map(value) if type(value) in _PLANS else value


def _plan(cls: type) -> tuple[list[_FieldPlan], Callable[[Any], tuple[Any, ...]]]:
    """What is to be known of each field, and what gets the values of all of them."""
    hints = get_type_hints(cls, include_extras=True)
    names = [f.name for f in fields(cls)]
    values_of = (
        attrgetter(*names) if len(names) > 1 else lambda message: tuple(getattr(message, name) for name in names)
    )
    return [_field_plan(f, hints[f.name]) for f in fields(cls)], values_of


def _field_plan(f: Field[Any], hint: Any) -> _FieldPlan:
    default = f.default_factory() if f.default_factory is not MISSING else f.default
    dtype = _COLUMN_DTYPES.get(hint)
    if dtype is not None:
        return f.name, default, MISSING if default is MISSING else b"", _column_packer(dtype)
    return f.name, default, default, _plain


_CLASSES: tuple[type, ...] = (
    StructuredOutputsParams,
    SamplingParams,
    *(
        cls
        for cls in vars(messages).values()
        if isinstance(cls, type) and is_dataclass(cls) and cls.__module__ == messages.__name__
    ),
)
_PLANS = {cls: _plan(cls) for cls in _CLASSES}
