"""Token ids to text, piece by piece: what is given out never changes, and all pieces together are the full decode.

What makes text of tokens is the tokenizer's *decoder*. Two kinds need care, since one character may be several tokens:

* Byte-level BPE (GPT-2, Llama 3, Qwen …): a token is bytes, the text their UTF-8. Here an incremental UTF-8 decoder
  holds back at most three bytes.
* Byte fallback (Llama 2, Mistral, Gemma …): a run of tokens like <0xE4> is its bytes' UTF-8, but if *any* byte of the
  run is wrong the whole run becomes one U+FFFD per byte. So a run is held back until it ends or is known to be wrong,
  or until it reaches MAX_RUN bytes; whole characters are then given out, and what follows counts as a new run.

All other decoders work token by token, up to what the first or last token of a text loses (a leading space); they are
asked for the text of the new tokens after one token of context. The work is linear in the number of tokens.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

MAX_RUN = 64
"""Longest run of byte tokens that is held back."""
MAX_UNFINISHED = 4
"""Tokens that a character may take under a decoder we know nothing about."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_REPLACEMENT = "\ufffd"


class Backend(Protocol):
    """What is needed of a `tokenizers.Tokenizer`."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = ...) -> str: ...
    def id_to_token(self, id: int) -> str | None: ...


class DecoderKind(Enum):
    BYTE_LEVEL = "byte-level"
    TOKENWISE = "tokenwise"
    """Each token gives whole characters, byte tokens aside."""
    UNKNOWN = "unknown"


@dataclass(slots=True)
class DecoderDescription:
    """What all streams of one tokenizer share."""

    kind: DecoderKind
    byte_fallback: bool
    special: frozenset[int]
    anchor: int | None = None
    """An ordinary token, to stand for "some text came before"."""
    token_bytes: dict[int, bytes] = field(default_factory=dict)


def describe_decoder(backend: Any) -> DecoderDescription:
    """Reads the decoder's kind off a `tokenizers.Tokenizer`."""
    special = frozenset(id_ for id_, token in backend.get_added_tokens_decoder().items() if token.special)
    stages = _stages(json.loads(backend.decoder.__getstate__())) if backend.decoder is not None else []
    names = {stage["type"] for stage in stages}
    if "ByteLevel" in names and names <= {"ByteLevel", "Fuse"}:
        return DecoderDescription(DecoderKind.BYTE_LEVEL, False, special)
    strips_more = any(stage["type"] == "Strip" and (stage["start"] > 1 or stage["stop"] > 0) for stage in stages)
    if names & {"ByteLevel", "CTC"} or strips_more:
        return DecoderDescription(DecoderKind.UNKNOWN, False, special)
    return DecoderDescription(DecoderKind.TOKENWISE, "ByteFallback" in names, special, _find_anchor(backend))


def _stages(decoder: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if decoder["type"] == "Sequence":
        return [stage for inner in decoder["decoders"] for stage in _stages(inner)]
    return [decoder]


def _find_anchor(backend: Any) -> int | None:
    for id_ in range(backend.get_vocab_size(with_added_tokens=False)):
        token = backend.id_to_token(id_)
        if token and not _BYTE_TOKEN.fullmatch(token) and backend.decode([id_]):
            return id_
    return None


class Detokenizer:
    """The text of one growing sequence of token ids.

    `context` are tokens before the sequence (the prompt's last ones), for decoders that take a leading space off the
    very first token; they give no text themselves. Without context the pieces make up exactly the tokenizer's own
    decode of the sequence.
    """

    def __init__(
        self,
        backend: Backend,
        decoder: DecoderDescription,
        context: Sequence[int] = (),
        skip_special_tokens: bool = True,
    ) -> None:
        skipped = decoder.special if skip_special_tokens else frozenset()
        if decoder.kind is DecoderKind.BYTE_LEVEL:
            self._text: _ByteLevelText | _TokenwiseText | _WindowText = _ByteLevelText(backend, decoder, skipped)
        elif decoder.kind is DecoderKind.TOKENWISE:
            self._text = _TokenwiseText(backend, decoder, skipped, context)
        else:
            self._text = _WindowText(backend, skipped, context)
        self._finished = False

    def push(self, ids: Sequence[int]) -> str:
        """The text that became certain with these tokens; may be empty. Raises ValueError after `finish`."""
        if self._finished:
            raise ValueError("this text is finished")
        return self._text.push(ids)

    def finish(self) -> str:
        """What was held back, given that nothing follows."""
        if self._finished:
            return ""
        self._finished = True
        return self._text.finish()


class _ByteLevelText:
    def __init__(self, backend: Backend, decoder: DecoderDescription, skipped: frozenset[int]) -> None:
        self._backend = backend
        self._token_bytes = decoder.token_bytes
        self._skipped = skipped
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Sequence[int]) -> str:
        return self._utf8.decode(b"".join([self._bytes_of(id_) for id_ in ids if id_ not in self._skipped]))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)

    def _bytes_of(self, id_: int) -> bytes:
        data = self._token_bytes.get(id_)
        if data is None:
            token = self._backend.id_to_token(id_)
            if token is None:
                return b""
            try:
                data = bytes([_BYTE_OF_CHARACTER[character] for character in token])
            except KeyError:  # an added token, spelled as the text that it is
                data = token.encode("utf-8")
            self._token_bytes[id_] = data
        return data


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 characters stand for their own byte, the other bytes, in ascending order,
    are given the code points from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_level_alphabet()


class _TokenwiseText:
    def __init__(
        self, backend: Backend, decoder: DecoderDescription, skipped: frozenset[int], context: Sequence[int]
    ) -> None:
        self._backend = backend
        self._decoder = decoder
        self._skipped = skipped
        self._before: list[int] = []
        """The last visible token, or nothing at the very beginning."""
        self._before_text = ""
        self._run: list[int] = []
        """Byte tokens held back; all their bytes so far may begin valid UTF-8."""
        self._run_utf8 = codecs.getincrementaldecoder("utf-8")("strict")
        self._run_is_wrong = False
        for id_ in reversed(context):
            if self._is_visible(id_):
                self._set_before(id_)
                break

    def push(self, ids: Sequence[int]) -> str:
        out: list[str] = []
        whole: list[int] = []
        for id_ in ids:
            token = None if id_ in self._skipped else self._backend.id_to_token(id_)
            if not token:
                continue
            byte = _BYTE_TOKEN.fullmatch(token) if self._decoder.byte_fallback else None
            if byte is not None:
                if whole:
                    out.append(self._render(whole))
                    whole = []
                out.append(self._push_byte(id_, int(byte[1], 16)))
            else:
                if self._run or self._run_is_wrong:
                    out.append(self._end_run())
                whole.append(id_)
        if whole:
            out.append(self._render(whole))
        return "".join(out)

    def finish(self) -> str:
        return self._end_run()

    def _push_byte(self, id_: int, byte: int) -> str:
        if self._run_is_wrong:
            return _REPLACEMENT
        self._run.append(id_)
        try:
            self._run_utf8.decode(bytes([byte]))
        except UnicodeDecodeError:
            held, self._run = len(self._run), []
            self._run_is_wrong = True
            self._set_before(id_)
            return _REPLACEMENT * held
        if len(self._run) < MAX_RUN:
            return ""
        unfinished = len(self._run_utf8.getstate()[0])
        cut = len(self._run) - unfinished
        certain, self._run = self._run[:cut], self._run[cut:]
        return self._render(certain)

    def _end_run(self) -> str:
        run, self._run = self._run, []
        self._run_is_wrong = False
        self._run_utf8.reset()
        return self._render(run) if run else ""

    def _render(self, ids: list[int]) -> str:
        """The text of visible tokens that begin and end where text may be cut."""
        text = self._backend.decode([*self._before, *ids], skip_special_tokens=False)[len(self._before_text) :]
        self._set_before(ids[-1])
        return text

    def _is_visible(self, id_: int) -> bool:
        return id_ not in self._skipped and bool(self._backend.id_to_token(id_))

    def _set_before(self, id_: int) -> None:
        if self._decoder.byte_fallback and self._decoder.anchor is not None:
            id_ = self._decoder.anchor  # a byte token would join the next run, and anything else serves as well
        if self._before != [id_]:
            self._before = [id_]
            self._before_text = self._backend.decode(self._before, skip_special_tokens=False)


class _WindowText:
    """For decoders that do not say how they work: a text that ends in U+FFFD may be waiting for more, for a while."""

    def __init__(self, backend: Backend, skipped: frozenset[int], context: Sequence[int]) -> None:
        self._backend = backend
        self._skipped = skipped
        self._before: list[int] = [id_ for id_ in context if id_ not in skipped][-MAX_UNFINISHED:]
        self._held: list[int] = []

    def push(self, ids: Sequence[int]) -> str:
        out = []
        for id_ in ids:
            if id_ not in self._skipped:
                self._held.append(id_)
                if len(self._held) > MAX_UNFINISHED or not self._held_text().endswith(_REPLACEMENT):
                    out.append(self._release())
        return "".join(out)

    def finish(self) -> str:
        return self._release()

    def _held_text(self) -> str:
        before = self._backend.decode(self._before, skip_special_tokens=False)
        return self._backend.decode([*self._before, *self._held], skip_special_tokens=False)[len(before) :]

    def _release(self) -> str:
        text = self._held_text() if self._held else ""
        self._before = [*self._before, *self._held][-MAX_UNFINISHED:]
        self._held = []
        return text
