"""What a caller may pass as prompt and sampling parameters, and what becomes of it: token ids and complete
SamplingParams."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict, TypeGuard

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter, ValidationError

from ..protocol.errors import ConfigurationError, InvalidRequest, over_context
from ..protocol.messages import ModelDescription
from ..protocol.sampling import (
    MAX_BAD_SEQUENCE_TOKENS,
    MAX_BAD_SEQUENCES,
    MAX_SEED,
    SAMPLING_FIELDS,
    SamplingParams,
)

if TYPE_CHECKING:
    from .tokenizer import Tokenizer


LONG_TEXT = 16_384
"""Characters of a text that take long enough that others should not wait for it."""
VALUE_CHARS = 16
"""As how many characters a value counts beside its own."""


class TokensPrompt(TypedDict):
    """A prompt as token ids, as vLLM writes it."""

    prompt_token_ids: Sequence[int]


Message: TypeAlias = Mapping[str, Any]
Prompt: TypeAlias = str | Sequence[int] | npt.NDArray[np.integer[Any]] | Sequence[Message] | TokensPrompt
"""Text, token ids, or a chat: a list of messages with `role` and `content`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """How a chat becomes text; see ChatTemplate.render."""

    tools: Sequence[Mapping[str, Any]] | None = None
    documents: Sequence[Mapping[str, Any]] | None = None
    chat_template: str | None = None
    """Replaces the model's own template (Jinja source)."""
    add_generation_prompt: bool | None = None
    """None: unless the final message is continued."""
    continue_final_message: bool = False
    template_variables: Mapping[str, Any] | None = None


def is_chat(prompt: object) -> TypeGuard[Sequence[Message]]:
    """Whether it is a list of chat messages."""
    return _is_list(prompt) and len(prompt) > 0 and all(isinstance(item, Mapping) and "role" in item for item in prompt)


def is_batch(prompt: object) -> bool:
    """Whether it is a list of several prompts rather than one. A list of token ids is told by its first item, however
    long it is."""
    return _is_list(prompt) and len(prompt) > 0 and not isinstance(prompt[0], _INTEGERS) and not is_chat(prompt)


def require_chat_options(prompt: object, chat: object) -> None:
    """Raises InvalidRequest if there are options for a chat and the prompt is none."""
    if chat is None:
        return
    if not isinstance(chat, ChatOptions):
        raise InvalidRequest(f"chat: expected a ChatOptions, got {type(chat).__name__}", field="chat")
    if not is_chat(prompt):
        raise InvalidRequest(
            "chat: these options are for a list of messages; a prompt of text or token ids is taken as it is",
            field="chat",
        )


def require_length(prompt: object, max_model_len: int) -> None:
    """Raises InvalidRequest if token ids are more than the model's context holds, before they are converted or sent.
    Says nothing of text."""
    if isinstance(prompt, np.ndarray):
        count = prompt.size
    elif _is_list(prompt) and not is_chat(prompt):
        count = len(prompt)
    else:
        return
    require_count(max_model_len, count)


def require_count(max_model_len: int, count: int) -> None:
    """Raises InvalidRequest for more tokens of a prompt than the model's context holds."""
    if count >= max_model_len:
        raise InvalidRequest(
            over_context(count, max_model_len),
            field="prompt",
            limit=max_model_len - 1,
            value=count,
        )


_INTEGERS = (int, np.integer)


def _is_list(value: object) -> TypeGuard[Sequence[object]]:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)


def is_long(*parts: object) -> bool:
    """Whether parts of a prompt are so much text, or so many values, that it takes long to make tokens of them. Looks
    at no more of them than it needs to."""
    left, stack = LONG_TEXT, list(parts)
    while stack and left > 0:
        part = stack.pop()
        left -= VALUE_CHARS
        if isinstance(part, str):
            left -= len(part)
        elif isinstance(part, Mapping | list | tuple):
            left -= VALUE_CHARS * len(part)
            if left > 0:
                stack.extend(part.values() if isinstance(part, Mapping) else part)
        elif part is not None and not isinstance(part, int | float):
            return True  # of no kind that tells its size
    return left <= 0


def to_token_ids(
    prompt: Prompt,
    tokenizer: Tokenizer | None,
    chat: ChatOptions | None = None,
    admit: Callable[[int], None] | None = None,
) -> npt.NDArray[np.int32]:
    """The prompt's tokens, at least one. `admit` is told how many a text has before anything else is made of them, and
    may raise. Raises InvalidRequest naming the field that is wrong, and ConfigurationError if the model has no
    tokenizer or chat template for it."""
    ids: object
    if isinstance(prompt, str):
        ids = _require(tokenizer).encode(prompt, admit=admit)
    elif is_chat(prompt):
        options = chat or ChatOptions()
        add_generation_prompt = options.add_generation_prompt
        text_tokenizer = _require(tokenizer)
        text = text_tokenizer.chat_template(bool(options.tools), options.chat_template).render(
            prompt,
            tools=options.tools,
            documents=options.documents,
            add_generation_prompt=not options.continue_final_message
            if add_generation_prompt is None
            else add_generation_prompt,
            continue_final_message=options.continue_final_message,
            variables=options.template_variables,
        )
        ids = text_tokenizer.encode(text, add_special_tokens=False, admit=admit)
    elif isinstance(prompt, Mapping):
        if set(prompt) != {"prompt_token_ids"}:
            raise InvalidRequest(
                f'prompt: a dict has "prompt_token_ids" and nothing else, got {sorted(map(str, prompt))}; '
                "a chat is a list of messages",
                field="prompt",
            )
        ids = prompt["prompt_token_ids"]
    else:
        ids = prompt
    return _as_column(ids)


def _require(tokenizer: Tokenizer | None) -> Tokenizer:
    if tokenizer is None:
        raise ConfigurationError("the model comes without a tokenizer: pass token ids instead of text")
    return tokenizer


def _as_column(ids: object) -> npt.NDArray[np.int32]:
    if not (_is_list(ids) or (isinstance(ids, np.ndarray) and ids.ndim > 0)):
        raise InvalidRequest(
            f"prompt: expected text, token ids or chat messages, got {type(ids).__name__}", field="prompt"
        )
    if len(ids) == 0:
        raise InvalidRequest("prompt: empty; a prompt has at least one token", field="prompt", limit=1, value=0)
    try:
        wide = np.asarray(ids)
    except (ValueError, OverflowError) as error:
        raise InvalidRequest(f"prompt: no flat list of token ids ({error})", field="prompt") from error
    if wide.ndim != 1 or not np.issubdtype(wide.dtype, np.integer):
        raise InvalidRequest(
            f"prompt: expected a flat list of integers, got {wide.ndim} dimensions of {wide.dtype}", field="prompt"
        )
    bad = wide[(wide < 0) | (wide > 2**31 - 1)]
    if len(bad):
        raise InvalidRequest(f"prompt: {bad[0]} is no token id", field="prompt", limit=2**31 - 1, value=int(bad[0]))
    return wide.astype(np.int32)


def resolve_sampling(
    model: ModelDescription, params: SamplingParams | None, overrides: Mapping[str, Any]
) -> SamplingParams:
    """Complete, checked parameters, with a seed.

    Without `params` the model's own defaults (generation_config.json: temperature, top_k, top_p) apply, then
    `overrides`; with `params` only `overrides`. Raises InvalidRequest naming field, limit and value.
    """
    unknown = sorted(set(overrides) - set(SAMPLING_FIELDS))
    if unknown:
        raise InvalidRequest(
            f"{unknown[0]}: not a sampling parameter that is supported here; these are: {', '.join(SAMPLING_FIELDS)}",
            field=unknown[0],
            value=overrides[unknown[0]],
        )
    if params is None:
        defaults = {name: value for name, value in model.default_sampling.items() if name in SAMPLING_FIELDS}
        params = SamplingParams(**{**defaults, **overrides})
    elif overrides:
        params = replace(params, **overrides)
    checked = _checked(params)
    if checked.seed is None:
        checked = replace(checked, seed=secrets.randbelow(MAX_SEED + 1))
    return checked


def with_bad_words(sampling: SamplingParams, tokenizer: Tokenizer | None) -> SamplingParams:
    """The parameters with the token sequences of their bad words, as vLLM makes them: of each word as it begins a text,
    and as it follows a space where that is another token. Raises InvalidRequest for words that cannot be."""
    if not sampling.bad_words:
        return sampling
    if tokenizer is None:
        raise InvalidRequest(
            "bad_words: the model comes without a tokenizer, so words are no tokens; use bad_words_token_ids",
            field="bad_words",
            value=list(sampling.bad_words),
        )
    sequences = list(sampling.bad_words_token_ids)
    for word in sampling.bad_words:
        alone, after_space = (
            tuple(tokenizer.encode(prefix + word.lstrip(), add_special_tokens=False)) for prefix in ("", " ")
        )
        if not alone or len(alone) > MAX_BAD_SEQUENCE_TOKENS:
            raise InvalidRequest(
                f"bad_words: {word!r:.100} is {len(alone)} tokens, must be 1 to {MAX_BAD_SEQUENCE_TOKENS}",
                field="bad_words",
                limit=MAX_BAD_SEQUENCE_TOKENS,
                value=len(alone),
            )
        sequences.append(alone)
        if len(after_space) == len(alone) and after_space[0] != alone[0]:
            sequences.append(after_space)
    if len(sequences) > MAX_BAD_SEQUENCES:
        raise InvalidRequest(
            f"bad_words: with bad_words_token_ids they are {len(sequences)} sequences of tokens, over the limit of "
            f"{MAX_BAD_SEQUENCES}",
            field="bad_words",
            limit=MAX_BAD_SEQUENCES,
            value=len(sequences),
        )
    return replace(sampling, bad_words_token_ids=tuple(sequences))


def require_random(sampling: SamplingParams, n: int) -> None:
    """Raises InvalidRequest for several samples that would all be the same."""
    if n > 1 and sampling.temperature == 0:
        raise InvalidRequest(
            f"n: {n} samples at temperature 0 would all be the same; raise temperature, or leave n out",
            field="n",
            limit=1,
            value=n,
        )


@cache
def _adapter() -> TypeAdapter[SamplingParams]:
    return TypeAdapter(SamplingParams)


_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


def _checked(params: SamplingParams) -> SamplingParams:
    values = {name: _without_numpy(getattr(params, name)) for name in SAMPLING_FIELDS}
    if values["stop"] is None or isinstance(values["stop"], str):
        values["stop"] = [] if values["stop"] is None else [values["stop"]]
    if values["bad_words"] is None:
        values["bad_words"] = []
    if params.structured_outputs is not None:
        from .structured import wire_form

        values["structured_outputs"] = wire_form(params.structured_outputs)
    for name in _NUMBERS:
        if isinstance(values[name], bool | str):
            raise InvalidRequest(
                f"{name}: expected a number, got {values[name]!r:.100}", field=name, value=values[name]
            )
    try:
        return _adapter().validate_python(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        limit = next((value for key, value in first.get("ctx", {}).items() if key != "error"), None)
        message = first["msg"][:1].lower() + first["msg"][1:]
        raise InvalidRequest(
            f"{field}: {message}, got {first['input']!r:.100}", field=field, limit=limit, value=first["input"]
        ) from error


def _without_numpy(value: Any) -> Any:
    """NumPy's numbers and arrays, which programs often have at hand, as Python's own."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [_without_numpy(item) for item in value]
    if isinstance(value, dict):
        return {_without_numpy(key): _without_numpy(item) for key, item in value.items()}
    return value
