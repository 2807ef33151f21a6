"""What answers have in common."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Any
from uuid import uuid4

from pydantic import BaseModel, ConfigDict
from starlette.responses import Response

from ..client.results import Completion
from ..client.results import Usage as ClientUsage


class Answer(BaseModel):
    """A part of an answer."""

    model_config = ConfigDict(extra="forbid")


class PromptTokensDetails(Answer):
    cached_tokens: int = 0


class Usage(Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None


def usage_of(*completions: Completion, completion_tokens: int | None = None) -> Usage:
    """What these took together; `completion_tokens` if it is known better."""
    used: list[ClientUsage] = [completion.usage for completion in completions]
    prompt = sum(one.prompt_tokens for one in used)
    output = sum(one.completion_tokens for one in used) if completion_tokens is None else completion_tokens
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=output,
        total_tokens=prompt + output,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(one.cached_tokens for one in used)),
    )


def new_id(prefix: str, given: str | None = None) -> str:
    """With the name that a request gave itself, or else one that nothing had before."""
    return prefix + (uuid4().hex if given is None else given)


def now() -> int:
    return int(time.time())


def json_response(answer: BaseModel) -> Response:
    return Response(answer.model_dump_json(by_alias=True), media_type="application/json")


async def response_with(answer: BaseModel, choices: Iterable[BaseModel]) -> Response:
    """`answer`, whose `choices` are empty, with these. Each is written as it is made, and the loop has its turn in
    between: thousands of them in one go would hold up everybody else."""
    before, after = answer.model_dump_json(by_alias=True).split(_NONE)  # no text of it holds that: quotes are escaped
    written = []
    for choice in choices:
        written.append(choice.model_dump_json(by_alias=True))
        await asyncio.sleep(0)
    content = f'{before}"choices":[{",".join(written)}]{after}'
    return Response(content, media_type="application/json")


_NONE = '"choices":[]'


def as_dict(answer: BaseModel) -> dict[str, Any]:
    return answer.model_dump(by_alias=True)
