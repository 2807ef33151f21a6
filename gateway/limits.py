"""How much one request may ask for in all: each part is within its bounds, but parts multiply."""

from __future__ import annotations

from .completion_schema import CompletionRequest
from .config import GatewayConfig
from .errors import refused


def require_room(asked: CompletionRequest, config: GatewayConfig) -> None:
    """Raises ApiError 400 if the prompts have too many samples, or too much of them is to be told with each sample."""
    prompts = asked.prompts()
    require_samples(len(prompts), asked.n, config)
    if not (asked.echo or asked.return_token_ids):
        return
    n, size = asked.n or 1, sum(map(len, prompts))
    times = 1 + (asked.logprobs or 0) if asked.echo and asked.logprobs is not None else 1
    limit = config.max_request_bytes
    if size * n * times > limit:
        field = "echo" if asked.echo else "return_token_ids"
        told = f" with {times} log-probabilities" if times > 1 else ""
        raise refused(
            field,
            f"prompts of {size} characters or token ids, told{told} for each of {n} samples, make {size * n * times}; "
            f"the limit is {limit}, as for bytes of a body (--max-request-bytes)",
        )


def require_samples(prompts: int, n: int | None, config: GatewayConfig) -> None:
    """Raises ApiError 400 for more samples than one HTTP request may have."""
    count, limit = prompts * max(n or 1, 1), config.max_request_samples
    if count > limit:
        raise refused(
            "n" if n is not None and n > 1 else "prompt",
            f"{prompts} prompts with {n or 1} samples each are {count} samples, over the limit of {limit} for one "
            "request (--max-request-samples); send several",
        )
