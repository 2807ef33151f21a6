"""What requests have in common: strict types, no unknown fields, and the fields that choose tokens.

Types are checked here; bounds are the SDK's and the scheduler's to check, which name field, limit and value.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from ..protocol.errors import InvalidRequest
from .errors import code_of, refused


def _boolean(value: Any) -> Any:
    """0 and 1 are no booleans, though Python finds them equal."""
    if not isinstance(value, bool):
        raise ValueError("input should be a valid boolean")  # noqa: TRY004  (what pydantic expects)
    return value


Float = Annotated[float, Field(strict=True, allow_inf_nan=False)]
One = Annotated[float, Field(strict=True, ge=1, le=1)]
No = Annotated[Literal[False], BeforeValidator(_boolean)]
Yes = Annotated[Literal[True], BeforeValidator(_boolean)]
TokenId = Annotated[int, Field(strict=True, ge=0, le=2**31 - 1)]
ShortText = Annotated[str, Field(max_length=512)]
RequestName = Annotated[str, Field(pattern=r"^[\x21-\x7e]{1,128}$")]

_T = TypeVar("_T")
Array = Annotated[list[_T], Field(fail_fast=True)]
"""A list that is given up at its first fault: nobody reads of a million of them, and to collect them takes minutes."""


class Strict(BaseModel):
    """A part of a request: JSON types are taken as they are, and unknown fields are refused unless they are null, which
    asks for nothing (`body.read` sees to that)."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        regex_engine="rust-regex",
        json_schema_extra={"additionalProperties": {"type": "null"}},
    )


class SamplingFields(Strict):
    """Named and meant as OpenAI's and vLLM's."""

    temperature: Float | None = None
    top_p: Float | None = None
    top_k: int | None = None
    min_p: Float | None = None
    seed: int | None = None
    stop: str | Array[str] | None = None
    stop_token_ids: Array[TokenId] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    presence_penalty: Float | None = None
    frequency_penalty: Float | None = None
    repetition_penalty: Float | None = None
    logit_bias: dict[str, Float] | None = None
    allowed_token_ids: Array[TokenId] | None = None
    bad_words: Array[str] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    n: int | None = None
    best_of: int | None = None
    priority: int | None = None
    cache_salt: str | None = None
    prompt_logprobs: None = None
    truncate_prompt_tokens: None = None
    use_beam_search: No | None = None
    length_penalty: One | None = None
    """Of beam search."""
    return_tokens_as_token_ids: No | None = None
    request_id: RequestName | None = None
    detokenize: Yes | None = None

    def sampling(self) -> dict[str, Any]:
        """Keyword arguments for the SDK: what was given, and nothing else."""
        given = {name: value for name in _SAMPLING if (value := getattr(self, name)) is not None}
        if self.logit_bias is not None:
            given["logit_bias"] = {_token_id(key): value for key, value in self.logit_bias.items()}
        if self.best_of not in (None, self.n or 1):
            raise refused("best_of", f"{self.best_of} is not n ({self.n or 1}); ranking samples is not supported")
        return given

    def options(self) -> dict[str, Any]:
        """Keyword arguments for the SDK besides sampling parameters."""
        return {name: value for name in ("n", "priority", "cache_salt") if (value := getattr(self, name)) is not None}


_SAMPLING = (
    "temperature top_p top_k min_p seed stop stop_token_ids ignore_eos min_tokens presence_penalty frequency_penalty "
    "repetition_penalty allowed_token_ids bad_words include_stop_str_in_output skip_special_tokens"
).split()


def _token_id(key: str) -> int:
    if not (key.isascii() and key.isdecimal() and len(key) <= 10):
        raise refused("logit_bias", f"{key[:40]!r} is no token id")
    return int(key)


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: No | None = None
    continuous_usage_stats: bool = False


class JsonSchemaFormat(Strict):
    name: ShortText | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(Strict):
    """vLLM's extra field; exactly one is given."""

    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    regex: str | None = None
    choice: Array[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool | None = None
    whitespace_pattern: str | None = None
    disable_additional_properties: No | None = None


class StructureFields(Strict):
    """Ways to say what form an answer has."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Array[str] | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None

    def structure(self) -> dict[str, Any]:
        """The SDK's `structured_outputs` as a keyword argument, if any form is asked for."""
        found: list[dict[str, Any]] = []
        if (given := self.structured_outputs) is not None:
            found.append(given.model_dump(by_alias=True, exclude_none=True, exclude={"disable_additional_properties"}))
        for kind in ("json", "regex", "choice", "grammar"):
            value = getattr(self, f"guided_{kind}")
            if value is not None:
                found.append({kind: value})
        form = self.response_format
        if form is not None and form.type == "json_object":
            found.append({"json_object": True})
        if form is not None and form.type == "json_schema":
            if form.json_schema is None or form.json_schema.schema_ is None:
                raise refused("response_format.json_schema", "needs a schema")
            found.append({"json": form.json_schema.schema_})
        if len(found) > 1:
            raise refused("response_format", "two forms are given for one answer; give one")
        if self.guided_whitespace_pattern is not None:
            if not found:
                raise refused("guided_whitespace_pattern", "only with guided_json or another form that is JSON")
            if "whitespace_pattern" in found[0]:
                raise refused("guided_whitespace_pattern", "structured_outputs has a whitespace_pattern too; give one")
            found[0]["whitespace_pattern"] = self.guided_whitespace_pattern
        return {"structured_outputs": found[0]} if found else {}

    def structure_field(self) -> str | None:
        """The field that `structure()` came from, if any form is asked for."""
        for name in ("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"):
            if getattr(self, name) is not None:
                return name
        form = self.response_format
        return None if form is None or form.type == "text" else "response_format"


@contextmanager
def told_as(structure: str | None, *, max_tokens: str = "max_tokens", prompt: str = "prompt") -> Iterator[None]:
    """What is wrong with the SDK's `structured_outputs`, `max_tokens` or prompt is told by the name of the field that
    the request said it in."""
    try:
        yield
    except InvalidRequest as error:
        field: str | None = error.field
        if error.field.startswith("structured_outputs"):
            field = structure or error.field
        elif error.field == "max_tokens":
            field = max_tokens
        elif error.field in ("prompt", "messages"):
            field = prompt
        if not field or error.field.startswith(field):
            raise
        why = str(error).removeprefix(error.field).removeprefix(": ")
        raise refused(field, why, code=code_of(error)) from error
