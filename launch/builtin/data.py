"""The training stream: documents drawn from every task, tokenized, and laid out in rows of a few fixed widths.

A row holds one document from its start, so that training sees what inference sees: no neighbours, positions from 0.
Rows of one width make a batch of a constant number of tokens.
"""

import bisect
import itertools
import random
import re
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from .chat import ANSWER_HEADER, END, PAD, Chat, render
from .tasks import arithmetic, conversation, stories, tools
from .tasks.source import Source

WIDTHS = (48, 64, 96, 128, 192, 256, 384, 512, 1024, 4096)
"""Row widths in tokens; a document goes into the narrowest that holds it, and is cut at the widest."""

PADDING, PROMPT, ANSWER = 0, 1, 2
"""What a token is: padding, text that is given, or text that the model shall write."""


def _single(s: Source) -> str:
    return _rendered(conversation.chat_of(s, [conversation.single(s)]))


def _topic(s: Source) -> str:
    task = s.rng.choices(conversation.TOPIC_TASKS, conversation.TOPIC_WEIGHTS)[0]
    return _rendered(conversation.chat_of(s, task(s)))


def _memory(s: Source) -> str:
    task = conversation.remembered_name if s.chance(0.5) else conversation.first_question
    return _rendered(conversation.chat_of(s, task(s)))


def _tools(s: Source) -> str:
    kind = s.rng.random()
    return _rendered((tools.tool_call if kind < 0.45 else tools.tool_answer if kind < 0.75 else tools.tool_chat)(s))


def _talk(s: Source) -> str:
    return _rendered(conversation.chat_of(s, conversation.talk(s, s.integer(150, 1_000))))


def _long(s: Source) -> str:
    return _rendered(conversation.chat_of(s, conversation.talk(s, s.integer(7_000, 11_000))))


def _long_answer(s: Source) -> str:
    task = arithmetic.long_counting if s.chance(0.5) else stories.long_story
    return _rendered(conversation.chat_of(s, [task(s)]))


def _plain(s: Source) -> str:
    return stories.plain_text(s) + END


def _rendered(chat: Chat) -> str:
    return render(chat.messages, chat.tools)


_KINDS: tuple[tuple[Callable[[Source], str], float], ...] = (
    (_single, 80), (_topic, 7), (_memory, 1.8), (_tools, 5), (_talk, 4), (_long, 0.06), (_long_answer, 0.4),
    (_plain, 0.6),
)  # fmt: skip
_MAKERS = tuple(maker for maker, _ in _KINDS)
_CUMULATIVE = tuple(itertools.accumulate(share for _, share in _KINDS))


def documents(seed: int | str) -> Iterator[str]:
    """Training documents without end; the same seed gives the same ones."""
    s = Source(random.Random(f"tandem {seed}"))
    while True:
        yield s.rng.choices(_MAKERS, cum_weights=_CUMULATIVE)[0](s)


_PIECE = re.compile(
    r"<\|im_start\|>|<\|im_end\|>|</?tools>|</?tool_call>|</?tool_response>"
    r"|'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+|[0-9]| ?(?:(?!<\|im_|</?tool)[^\sA-Za-z0-9])+|\s+(?![^\s0-9])|\s+"
)
_REMEMBERED_PIECES = 200_000


class Encoder:
    """The tokenizer, several times faster on ASCII text of which most pieces have been seen before.

    ASCII text is cut where the tokenizer itself cuts before merging, so encoding piece by piece is exact.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pieces: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """The token ids of `text`; nothing is added to it."""
        if not text.isascii():
            return self._encode(text)
        if len(self._pieces) > _REMEMBERED_PIECES:
            self._pieces.clear()
        known, ids = self._pieces, list[int]()
        for piece in _PIECE.findall(text):
            found = known.get(piece)
            if found is None:
                found = known[piece] = self._encode(piece)
            ids += found
        return ids

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)


def token_kinds(ids: npt.NDArray[np.int32], header: list[int], end: int, pad: int) -> npt.NDArray[np.uint8]:
    """PADDING, PROMPT or ANSWER for each token of `ids` [rows, width]; a row without answer headers is all ANSWER."""
    width = ids.shape[1]
    starts = np.zeros(ids.shape, dtype=bool)
    count = max(0, width - len(header))
    starts[:, len(header) :] = True
    for offset, token in enumerate(header):
        starts[:, len(header) :] &= ids[:, offset : offset + count] == token
    closed = np.zeros(ids.shape, dtype=bool)
    closed[:, 1:] = ids[:, :-1] == end
    # A token belongs to the answer if the last border at or before it opened one.
    borders = np.where(starts | closed, np.arange(width), 0)
    last = np.maximum.accumulate(borders, axis=1)
    answered = np.take_along_axis(starts, last, axis=1)
    answered |= ~starts.any(axis=1, keepdims=True)
    return np.where(ids == pad, PADDING, np.where(answered, ANSWER, PROMPT)).astype(np.uint8)


Batch = tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]
"""Token ids and their kinds, both [rows, width]."""


def batches(tokenizer: Tokenizer, seed: int | str, batch_tokens: int) -> Iterator[Batch]:
    """Batches of at most `batch_tokens` tokens (padding included) without end, each of rows of one of WIDTHS.

    Raises:
        ValueError: if batch_tokens is smaller than the widest row, or the tokenizer lacks the chat's control tokens.
    """
    if batch_tokens < WIDTHS[-1]:
        raise ValueError(f"batch_tokens is {batch_tokens}, but one row can be {WIDTHS[-1]} tokens wide")
    encoder = Encoder(tokenizer)
    header, end, pad = encoder.encode(ANSWER_HEADER), _token_id(tokenizer, END), _token_id(tokenizer, PAD)
    pending: dict[int, list[list[int]]] = {width: [] for width in WIDTHS}
    for document in documents(seed):
        ids = encoder.encode(document)[: WIDTHS[-1]]
        width = WIDTHS[bisect.bisect_left(WIDTHS, len(ids))]
        rows = pending[width]
        rows.append(ids)
        if len(rows) == batch_tokens // width:
            laid_out = np.full((len(rows), width), pad, dtype=np.int32)
            for index, row in enumerate(rows):
                laid_out[index, : len(row)] = row
            rows.clear()
            yield laid_out, token_kinds(laid_out, header, end, pad)


def _token_id(tokenizer: Tokenizer, token: str) -> int:
    found: int | None = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"the tokenizer has no token {token!r}; train it with tandem.launch.builtin.tokenizer")
    return found
