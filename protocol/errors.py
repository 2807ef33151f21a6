"""The exceptions that Tandem raises towards its users, as one small tree."""

from __future__ import annotations

from typing import Any


class TandemError(Exception):
    """Base of everything that Tandem raises on purpose. All of these can be pickled, as programs of several processes
    need it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _same, (type(self), self.args, self.__dict__)


def _same(kind: type[TandemError], arguments: tuple[Any, ...], attributes: dict[str, Any]) -> TandemError:
    """Not by calling it: what it is made from is not what it holds."""
    error = kind.__new__(kind, *arguments)
    error.__dict__.update(attributes)
    return error


class ConfigurationError(TandemError):
    """Options, addresses or files do not fit together; the message says which and what to do."""


class ServiceUnavailable(TandemError):
    """No scheduler answered, or it went away and did not come back."""


class VersionMismatch(ServiceUnavailable):
    """The two ends speak different versions of the protocol."""


class AuthenticationError(ServiceUnavailable):
    """The scheduler does not admit this client or worker."""


class ProtocolError(TandemError):
    """A peer sent something that the protocol does not allow."""


class MessageTooLarge(ProtocolError):
    """A message is over the transport's limit; it was not sent."""


class OffsetError(ProtocolError):
    """A stream had a gap or a repeat: the token at `got` came where `expected` was due."""

    def __init__(self, expected: int, got: int) -> None:
        super().__init__(f"stream broken: expected the token at offset {expected}, got offset {got}")
        self.expected = expected
        self.got = got


class RequestError(TandemError):
    """One request did not complete. Other requests are not affected."""


class InvalidRequest(RequestError):
    """The request was refused at the door. `field`, `limit` and `value` name what was wrong."""

    def __init__(self, message: str, *, field: str = "", limit: Any = None, value: Any = None) -> None:
        super().__init__(message)
        self.field = field
        self.limit = limit
        self.value = value


OVER_CONTEXT = "this model's maximum context length is"
"""In what is said of prompts that are too long, since programs look for it: they cut the chat and try again."""


def over_context(count: int, max_model_len: int) -> str:
    """What is wrong with a prompt of so many tokens."""
    return (
        f"{OVER_CONTEXT} {max_model_len} tokens, which leaves room for {max_model_len - 1} of a prompt and one of "
        f"output; the prompt has {count}"
    )


class Overloaded(RequestError):
    """The service holds as many requests as it may; try again after `retry_after` seconds."""

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RequestFailed(RequestError):
    """An accepted request could not be finished; tokens that were already delivered stand."""


class ModelChanged(RequestFailed):
    """The service came back with another model, by whose tokens this request cannot go on."""


class RequestTimeout(RequestError):
    """The deadline that the caller set passed before the request ended. `completion` is what had come until then (the
    client's Completion, with finish_reason "timeout"), or None if the request had not been sent."""

    def __init__(self, message: str, *, completion: Any = None) -> None:
        super().__init__(message)
        self.completion = completion


class RequestCancelled(RequestError):
    """The request was cancelled before it ended."""
