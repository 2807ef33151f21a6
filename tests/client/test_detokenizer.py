"""Streamed text: nothing given out changes, and all of it together is the full decode."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders

from tandem import AsyncClient
from tandem.client.detokenizer import MAX_RUN, Detokenizer, describe_decoder
from tandem.client.tokenizer import Tokenizer
from tandem.protocol.messages import Submit

from support.scripted_scheduler import MODEL, ScriptedScheduler
from support.tokenizer_zoo import TEXTS, ZOO, byte_fallback, byte_level

TOKENIZERS = {name: Tokenizer.from_files(files()) for name, files in ZOO.items()}


def stream(detokenizer: Detokenizer, pieces: Sequence[Sequence[int]]) -> list[str]:
    return [*(detokenizer.push(piece) for piece in pieces), detokenizer.finish()]


@st.composite
def cut_ids(draw: st.DrawFn, vocab_size: int) -> list[list[int]]:
    """Random ids (some outside the vocabulary) in random pieces."""
    return draw(st.lists(st.lists(st.integers(0, vocab_size + 3), max_size=6), max_size=12))


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("skip_special", [True, False])
def test_random_ids_give_the_full_decode(name: str, skip_special: bool) -> None:
    tokenizer = TOKENIZERS[name]

    @given(cut_ids(tokenizer.vocab_size))
    def check(pieces: list[list[int]]) -> None:
        streamed = stream(tokenizer.detokenizer(skip_special_tokens=skip_special), pieces)
        assert "".join(streamed) == tokenizer.decode([i for piece in pieces for i in piece], skip_special)

    check()


@given(st.lists(st.integers(0, 255), max_size=40), st.integers(1, 5))
def test_random_bytes_with_byte_fallback(data: list[int], step: int) -> None:
    """Byte tokens follow <unk>, <s>, </s> in this vocabulary."""
    tokenizer = TOKENIZERS["byte_fallback"]
    ids = [3 + byte for byte in data]
    pieces = [ids[i : i + step] for i in range(0, len(ids), step)]
    assert "".join(stream(tokenizer.detokenizer(), pieces)) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("text", TEXTS)
def test_real_text_token_by_token(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text, add_special_tokens=False)
    streamed = stream(tokenizer.detokenizer(), [[i] for i in ids])
    assert "".join(streamed) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
def test_no_half_characters(name: str) -> None:
    text = "a😀b👨‍👩‍👧ภาษา🎉🎊"
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = stream(tokenizer.detokenizer(), [[i] for i in ids])
    assert len(pieces) > len(text)  # characters of several tokens were in it
    assert "\ufffd" not in "".join(pieces)


@pytest.mark.parametrize("name", ["byte_fallback", "unigram", "word_piece", "suffixed", "undecoded"])
def test_context_keeps_the_leading_space(name: str) -> None:
    """With the prompt as context, prompt and answer together read as one text."""
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode("Hello world how are you", add_special_tokens=False)
    for cut in range(1, len(ids)):
        rest = "".join(stream(tokenizer.detokenizer(context=ids[:cut]), [ids[cut:]]))
        assert tokenizer.decode(ids[:cut]) + rest == tokenizer.decode(ids)


def test_context_of_hidden_tokens_is_no_context() -> None:
    tokenizer = TOKENIZERS["byte_fallback"]
    ids = tokenizer.encode("Hello", add_special_tokens=False)
    assert "".join(stream(tokenizer.detokenizer(context=[1]), [ids])) == "Hello"


def test_a_long_valid_run_is_not_held_forever() -> None:
    tokenizer = TOKENIZERS["byte_fallback"]
    detokenizer = tokenizer.detokenizer()
    emoji = "😀".encode()
    shown, most_pending = "", 0
    for count in range(1, 3 * MAX_RUN):
        shown += detokenizer.push([3 + emoji[(count - 1) % 4]])
        most_pending = max(most_pending, count - 4 * len(shown))
    assert most_pending <= MAX_RUN
    assert set(shown) == {"😀"}


def test_finish_gives_the_rest_once() -> None:
    detokenizer = TOKENIZERS["byte_level"].detokenizer()
    incomplete = TOKENIZERS["byte_level"].encode("😀", add_special_tokens=False)[:-1]
    assert detokenizer.push(incomplete) == ""
    assert detokenizer.finish() == "\ufffd"
    assert detokenizer.finish() == ""
    with pytest.raises(ValueError, match="finished"):
        detokenizer.push([1])


class CountingBackend:
    """Counts how many tokens are decoded and looked up."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.backend = Backend.from_buffer(files["tokenizer.json"])
        self.work = 0

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        self.work += len(ids)
        text: str = self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def id_to_token(self, id: int) -> str | None:
        self.work += 1
        token: str | None = self.backend.id_to_token(id)
        return token


def _invalid_byte_ids(files: dict[str, bytes], tail: str) -> list[int]:
    backend: Any = Backend.from_buffer(files["tokenizer.json"])
    names = {"byte_level": ["Ģ", "ĥ"], "byte_fallback": ["<0xFF>", tail]}
    kind = "byte_fallback" if backend.token_to_id("<0xFF>") is not None else "byte_level"
    first, other = (backend.token_to_id(name) for name in names[kind])
    assert first is not None
    assert other is not None
    return [first, *[other] * 9_999]


@pytest.mark.parametrize("tail", ["<0xFF>", "<0x41>", "<0x80>"])
@pytest.mark.parametrize("files", [byte_level(), byte_fallback()], ids=["byte_level", "byte_fallback"])
def test_ten_thousand_invalid_bytes_take_linear_work(files: dict[str, bytes], tail: str) -> None:
    ids = _invalid_byte_ids(files, tail)
    backend = CountingBackend(files)
    detokenizer = Detokenizer(backend, describe_decoder(backend.backend))
    pieces = stream(detokenizer, [[i] for i in ids])
    assert "".join(pieces) == backend.backend.decode(ids) == "\ufffd" * 10_000
    assert backend.work <= 5 * len(ids)
    assert max(map(len, pieces)) <= MAX_RUN


@pytest.mark.parametrize("name", ZOO)
def test_ordinary_streams_take_linear_work(name: str) -> None:
    files = ZOO[name]()
    backend = CountingBackend(files)
    ids = TOKENIZERS[name].encode("Hello, world! 你好 😀 " * 300, add_special_tokens=False)
    detokenizer = Detokenizer(backend, describe_decoder(backend.backend))
    streamed = "".join(stream(detokenizer, [[i] for i in ids]))
    work = backend.work
    assert streamed == backend.backend.decode(ids)
    assert work <= 5 * len(ids)


def test_an_unknown_decoder_holds_back_little() -> None:
    """A sequence that goes on after the byte-level stage: whole characters, and no more than a few tokens held."""
    files = byte_level()
    backend = Backend.from_buffer(files["tokenizer.json"])
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("world", "there")])
    tokenizer = Tokenizer.from_files({**files, "tokenizer.json": backend.to_str().encode()})
    ids = tokenizer.encode("a😀b 你好", add_special_tokens=False)
    assert "".join(stream(tokenizer.detokenizer(), [[i] for i in ids])) == "a😀b 你好"
    invalid = tokenizer.token_id("Ģ")
    assert invalid is not None
    detokenizer = tokenizer.detokenizer()
    shown = "".join(detokenizer.push([invalid]) for _ in range(100))
    assert len(shown) >= 100 - 5
    assert shown + detokenizer.finish() == "\ufffd" * 100


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
def test_random_ids_over_the_client(name: str) -> None:
    """Through a real socket: the chunks of a stream, and a whole answer, are the full decode after the prompt."""
    tokenizer = TOKENIZERS[name]
    prompt = tokenizer.encode("Hello", add_special_tokens=False)
    eos = tokenizer.eos_token_ids[0]
    pieces: list[list[int]] = []

    def script(scheduler: ScriptedScheduler, submit: Submit) -> None:
        scheduler.accept(submit)
        offset = 0
        for piece in pieces:
            scheduler.tokens(submit.ticket, piece, offset)
            offset += len(piece)
        scheduler.tokens(submit.ticket, [eos], offset, [scheduler.end(submit, offset + 1)])

    async def answers(client: AsyncClient) -> None:
        chunks = [chunk async for chunk in client.stream(prompt, max_tokens=200)]
        ids = [id_ for piece in pieces for id_ in piece]
        assert [id_ for chunk in chunks for id_ in chunk.token_ids] == [*ids, eos]
        text = tokenizer.decode([*prompt, *ids])
        assert tokenizer.decode(prompt) + "".join(chunk.text for chunk in chunks) == text
        assert tokenizer.decode(prompt) + (await client.generate(prompt, max_tokens=200)).text == text

    model = replace(MODEL, vocab_size=tokenizer.vocab_size, eos_token_ids=(eos,))
    some_ids = st.integers(0, tokenizer.vocab_size - 1).filter(lambda id_: id_ != eos)
    with asyncio.Runner() as runner:

        async def connect() -> tuple[ScriptedScheduler, AsyncClient]:
            scheduler = await ScriptedScheduler(script, model=model, files=ZOO[name]()).__aenter__()
            client = AsyncClient(scheduler.address)
            await client.connect()
            return scheduler, client

        scheduler, client = runner.run(connect())

        @given(st.lists(st.lists(some_ids, min_size=1, max_size=6), max_size=8))
        @settings(max_examples=60, deadline=None)
        def check(drawn: list[list[int]]) -> None:
            pieces[:] = drawn
            runner.run(answers(client))

        try:
            check()
        finally:
            runner.run(client.close())
            runner.run(scheduler.__aexit__())
