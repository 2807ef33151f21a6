"""The client: text in and out of a running service, without torch or transformers.

It keeps what a request has got so far, so that a request goes on when the scheduler that worked on it is lost.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .aio import AsyncClient as AsyncClient
    from .completion import CompletionStream as CompletionStream
    from .prompts import ChatOptions as ChatOptions
    from .prompts import TokensPrompt as TokensPrompt
    from .results import Choice as Choice
    from .results import Chunk as Chunk
    from .results import Completion as Completion
    from .results import PositionLogprobs as PositionLogprobs
    from .results import Timings as Timings
    from .results import TokenLogprob as TokenLogprob
    from .results import Usage as Usage
    from .sync import Client as Client
    from .sync import SyncCompletionStream as SyncCompletionStream
    from .tokenizer import Tokenizer as Tokenizer

_WHERE = {
    "AsyncClient": ".aio",
    "Client": ".sync",
    "CompletionStream": ".completion",
    "SyncCompletionStream": ".sync",
    "Completion": ".results",
    "Chunk": ".results",
    "Choice": ".results",
    "Usage": ".results",
    "Timings": ".results",
    "TokenLogprob": ".results",
    "PositionLogprobs": ".results",
    "ChatOptions": ".prompts",
    "TokensPrompt": ".prompts",
    "Tokenizer": ".tokenizer",
}

__all__ = [*_WHERE]


def __getattr__(name: str) -> object:
    """Imports what is asked for, so that a program pays for what it uses."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(_WHERE[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
