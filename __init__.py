"""Tandem serves large language models from GPUs. A running service is used through the client:

from tandem import Client

with Client() as client:
    print(client.generate("The capital of France is", max_tokens=16).text)
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .client import AsyncClient as AsyncClient
    from .client import ChatOptions as ChatOptions
    from .client import Choice as Choice
    from .client import Chunk as Chunk
    from .client import Client as Client
    from .client import Completion as Completion
    from .client import CompletionStream as CompletionStream
    from .client import PositionLogprobs as PositionLogprobs
    from .client import SyncCompletionStream as SyncCompletionStream
    from .client import Timings as Timings
    from .client import TokenLogprob as TokenLogprob
    from .client import TokensPrompt as TokensPrompt
    from .client import Usage as Usage
    from .launch.llm import LLM as LLM
    from .launch.llm import CompletionOutput as CompletionOutput
    from .launch.llm import Logprob as Logprob
    from .launch.llm import RequestOutput as RequestOutput
    from .protocol.errors import AuthenticationError as AuthenticationError
    from .protocol.errors import ConfigurationError as ConfigurationError
    from .protocol.errors import InvalidRequest as InvalidRequest
    from .protocol.errors import ModelChanged as ModelChanged
    from .protocol.errors import OffsetError as OffsetError
    from .protocol.errors import Overloaded as Overloaded
    from .protocol.errors import ProtocolError as ProtocolError
    from .protocol.errors import RequestCancelled as RequestCancelled
    from .protocol.errors import RequestError as RequestError
    from .protocol.errors import RequestFailed as RequestFailed
    from .protocol.errors import RequestTimeout as RequestTimeout
    from .protocol.errors import ServiceUnavailable as ServiceUnavailable
    from .protocol.errors import TandemError as TandemError
    from .protocol.errors import VersionMismatch as VersionMismatch
    from .protocol.sampling import SamplingParams as SamplingParams
    from .protocol.structured import StructuredOutputsParams as StructuredOutputsParams

__version__ = "0.1.0"

__all__ = [
    "Client",
    "AsyncClient",
    "SamplingParams",
    "StructuredOutputsParams",
    "ChatOptions",
    "TokensPrompt",
    "CompletionStream",
    "SyncCompletionStream",
    "Completion",
    "Choice",
    "Chunk",
    "Usage",
    "Timings",
    "LLM",
    "RequestOutput",
    "CompletionOutput",
    "Logprob",
    "TokenLogprob",
    "PositionLogprobs",
    "TandemError",
    "ConfigurationError",
    "ServiceUnavailable",
    "VersionMismatch",
    "AuthenticationError",
    "ProtocolError",
    "OffsetError",
    "RequestError",
    "InvalidRequest",
    "Overloaded",
    "RequestFailed",
    "ModelChanged",
    "RequestTimeout",
    "RequestCancelled",
]


def __getattr__(name: str) -> object:
    """Imports what is asked for, so that `import tandem` costs nothing."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for module in (".protocol.errors", ".client", ".protocol.sampling", ".protocol.structured", ".launch.llm"):
        value: object = getattr(import_module(module, __name__), name, None)
        if value is not None:
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} lists {name!r} but has no such attribute")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
