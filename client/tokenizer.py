"""Text to token ids and back, from the files that the scheduler hands out, as transformers' fast tokenizers do it but
without transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import tokenizers
from tokenizers import AddedToken

from ..protocol.errors import ConfigurationError, InvalidRequest
from .chat import ChatTemplate
from .detokenizer import Detokenizer, describe_decoder
from .prompts import LONG_TEXT

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
LEGACY_TEMPLATE_FILE = "chat_template.json"
TEMPLATE_FOLDER = "additional_chat_templates/"
GENERATION_FILE = "generation_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"

_LIST_KEYS = ("extra_special_tokens", "additional_special_tokens")


class Tokenizer:
    """A model's tokenizer and chat templates. Methods may be called from several threads."""

    def __init__(self, backend: tokenizers.Tokenizer, config: Mapping[str, Any], templates: Mapping[str, str]) -> None:
        self._backend = backend
        self.special_tokens: dict[str, str] = _named_special_tokens(config)
        """Named special tokens, such as bos_token, and their text; chat templates see these."""
        added = backend.get_added_tokens_decoder()
        self.added_ids: frozenset[int] = frozenset(added)
        """Tokens that were given to the vocabulary as wholes, special ones among them."""
        self.special_ids: frozenset[int] = frozenset(id_ for id_, token in added.items() if token.special)
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.eos_token_ids: tuple[int, ...] = _eos_ids(backend, config, self.special_tokens)
        self.chat_templates: dict[str, str] = dict(templates)
        self._compiled: dict[str, ChatTemplate] = {}

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> Tokenizer:
        """Builds it from file names and contents: tokenizer.json, and as far as they exist tokenizer_config.json,
        special_tokens_map.json, generation_config.json, chat_template.jinja (or a template in the configuration) and
        additional_chat_templates/*.jinja. What is put around a text is tokenizer.json's post-processor alone:
        add_bos_token and add_eos_token of the configuration do not count beside it, as in transformers 5. Raises
        ConfigurationError naming the file that is missing or broken."""
        if TOKENIZER_FILE not in files:
            raise ConfigurationError(f"the model comes without {TOKENIZER_FILE}, so text cannot be turned into tokens")
        try:
            backend = tokenizers.Tokenizer.from_buffer(files[TOKENIZER_FILE])
        except Exception as error:  # the tokenizers library raises plain Exception
            raise ConfigurationError(f"{TOKENIZER_FILE}: {error}") from error
        config = _read_json(files, CONFIG_FILE)
        if "added_tokens_decoder" not in config:
            config = {**config, **_read_json(files, SPECIAL_TOKENS_FILE)}
        config["generation_eos"] = _read_json(files, GENERATION_FILE).get("eos_token_id")
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = bool(config.get("split_special_tokens", False))
        _add_tokens(backend, config)
        return cls(backend, config, _read_templates(files, config))

    def encode(
        self, text: str, add_special_tokens: bool = True, *, admit: Callable[[int], None] | None = None
    ) -> list[int]:
        """The token ids of `text`, with the beginning-of-sequence token and what else the model wants unless
        `add_special_tokens` is false (text from a chat template already has them). `admit` is told how many they are
        before the list is made, and may raise. Raises InvalidRequest if the text holds lone surrogates, or the
        tokenizer has no tokens for it."""
        try:
            if len(text) < LONG_TEXT:
                found = self._backend.encode(text, add_special_tokens=add_special_tokens)
            else:  # without the interpreter lock, and without each token's place in the text, which take longer to free
                (found,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except (UnicodeEncodeError, TypeError) as error:
            raise InvalidRequest(f"prompt: no valid Unicode text{_where_not(text)}", field="prompt") from error
        except Exception as error:  # plain ones of the tokenizers library, as of a vocabulary that lacks its own <unk>
            raise InvalidRequest(f"prompt: the model's tokenizer cannot encode it: {error}", field="prompt") from error
        if admit is not None:
            admit(len(found))
        ids: list[int] = found.ids
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids` on its own; ids outside the vocabulary give nothing."""
        if len(ids) < LONG_TEXT:
            text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        else:  # without the interpreter lock
            (text,) = self._backend.decode_batch([list(ids)], skip_special_tokens=skip_special_tokens)
        return text

    def detokenizer(self, context: Sequence[int] = (), skip_special_tokens: bool = True) -> Detokenizer:
        """A new stream of text; see Detokenizer for `context`."""
        return Detokenizer(self._backend, self._decoder, context, skip_special_tokens)

    def token_id(self, token: str) -> int | None:
        """The id of a vocabulary entry."""
        id_: int | None = self._backend.token_to_id(token)
        return id_

    def chat_template(self, tools: bool = False, source: str | None = None) -> ChatTemplate:
        """The template for a chat, with tools or without; `source` replaces the model's own. Raises
        ConfigurationError if the model has none."""
        if source is None:
            source = self.chat_templates.get("tool_use") if tools else None
            source = source or self.chat_templates.get("default")
        if source is None:
            known = f" (it has templates named {', '.join(self.chat_templates)})" if self.chat_templates else ""
            raise ConfigurationError(
                f"the model has no chat template{known}; pass text or token ids, or give chat_template"
            )
        template = self._compiled.get(source)
        if template is None:
            template = ChatTemplate(source, self.special_tokens)
            if source in self.chat_templates.values():  # callers' own templates are not kept: they have no bound
                self._compiled[source] = template
        return template

    @cached_property
    def _decoder(self) -> Any:
        return describe_decoder(self._backend)


def _where_not(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f": it holds the lone surrogate U+{ord(text[error.start]):04X}"
    return ""


def _read_json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    if name not in files:
        return {}
    try:
        content = json.loads(files[name])
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{name}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"{name}: expected an object, got {type(content).__name__}")
    return content


def _text_of(token: Any) -> str | None:
    """Special tokens are written as strings or as objects with `content`."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _named_special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    named = {key: text for key, value in config.items() if key.endswith("_token") and (text := _text_of(value))}
    for key in _LIST_KEYS:
        if isinstance(extra := config.get(key), Mapping):
            named |= {name: text for name, value in extra.items() if (text := _text_of(value))}
    return named


def _added_token(content: str, fields: Mapping[str, Any], special: bool) -> AddedToken:
    flags = {key: fields[key] for key in ("single_word", "lstrip", "rstrip", "normalized") if key in fields}
    return AddedToken(content, special=special, **flags)


def _add_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Adds what the configuration knows and tokenizer.json does not, so that special tokens are one token each."""
    known = backend.get_added_tokens_decoder()
    same = {repr(token) for token in known.values()}
    listed = config.get("added_tokens_decoder") or {}
    try:
        for _, fields in sorted(listed.items(), key=lambda item: int(item[0])):
            token = _added_token(fields["content"], fields, bool(fields.get("special", False)))
            if repr(token) not in same:
                backend.add_tokens([token])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigurationError(f"{CONFIG_FILE}: added_tokens_decoder is malformed: {error!r}") from error
    specials: list[Any] = [value for key, value in config.items() if key.endswith("_token")]
    for key in _LIST_KEYS:
        extra = config.get(key) or []
        if not isinstance(extra, Mapping | list):
            raise ConfigurationError(f"{CONFIG_FILE}: {key}: expected a list or an object, got {type(extra).__name__}")
        specials.extend(extra.values() if isinstance(extra, Mapping) else extra)
    present = {token.content for token in backend.get_added_tokens_decoder().values()}
    for value in specials:
        text = _text_of(value)
        if text and text not in present:
            present.add(text)
            backend.add_special_tokens([_added_token(text, value if isinstance(value, Mapping) else {}, True)])


def _eos_ids(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> tuple[int, ...]:
    listed = config.get("generation_eos")
    if isinstance(listed, int):
        return (listed,)
    if isinstance(listed, list) and all(isinstance(id_, int) for id_ in listed):
        return tuple(listed)
    text = special_tokens.get("eos_token")
    id_ = backend.token_to_id(text) if text else None
    return () if id_ is None else (id_,)


def _read_templates(files: Mapping[str, bytes], config: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name. Files replace the configuration's templates altogether."""
    found: dict[str, str] = {}
    for name, content in files.items():
        is_extra = name.startswith(TEMPLATE_FOLDER) and name.endswith(".jinja")
        if name == TEMPLATE_FILE or is_extra:
            try:
                text = content.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ConfigurationError(f"{name}: not UTF-8: {error}") from error
            found[name.removeprefix(TEMPLATE_FOLDER).removesuffix(".jinja") if is_extra else "default"] = text
    if found:
        return found
    given = config.get("chat_template") or _read_json(files, LEGACY_TEMPLATE_FILE).get("chat_template")
    if isinstance(given, str):
        return {"default": given}
    if isinstance(given, list):
        try:
            return {str(entry["name"]): str(entry["template"]) for entry in given}
        except (TypeError, KeyError) as error:
            raise ConfigurationError(f"{CONFIG_FILE}: chat_template: expected name and template in each") from error
    return {}
