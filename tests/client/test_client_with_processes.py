"""The client with a real scheduler and a real worker: a tiny random model, the CPU, real sockets."""

import asyncio
from collections.abc import Iterator

import pytest

from tandem import AsyncClient, Client, InvalidRequest, RequestCancelled, SamplingParams

from support.systems import embedded
from support.tiny_models import EOS, VOCAB, save_tiny

PROMPTS = ["Hello", "a somewhat longer prompt, with punctuation!", "x"]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny("llama", folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
    options = {"model": str(folder), "device": "cpu", "threads": 1, "batch_invariant": True, "max_model_len": 256}
    with embedded(options) as system:
        yield system.address


def test_a_completion_and_its_stream_agree(address: str) -> None:
    async def main() -> None:
        async with AsyncClient(address) as client:
            assert client.model.vocab_size == VOCAB
            assert client.model.max_model_len == 256
            assert client.model.eos_token_ids == (EOS,)
            whole = await client.generate(PROMPTS[0], GREEDY)
            assert len(whole.token_ids) == 24
            assert whole.finish_reason == "length"
            assert whole.usage.prompt_tokens == len(whole.prompt_token_ids)
            assert 0.0 <= whole.timings.queue_s <= whole.timings.first_token_s <= whole.timings.total_s
            chunks = [chunk async for chunk in client.stream(PROMPTS[0], GREEDY)]
            assert [token for chunk in chunks for token in chunk.token_ids] == whole.token_ids
            assert "".join(chunk.text for chunk in chunks) == whole.text
            tokenizer = await client.tokenizer()
            assert tokenizer is not None
            assert whole.text == tokenizer.decode(whole.token_ids)

    asyncio.run(main())


def test_a_list_equals_its_parts(address: str) -> None:
    async def main() -> None:
        async with AsyncClient(address, max_concurrency=2) as client:
            together = await client.generate(PROMPTS * 3, GREEDY)
            alone = [await client.generate(prompt, GREEDY) for prompt in PROMPTS]
            assert [c.token_ids for c in together] == [c.token_ids for c in alone] * 3

    asyncio.run(main())


def test_a_seed_repeats_what_was_drawn(address: str) -> None:
    with Client(address) as client:
        first = client.generate(PROMPTS[1], temperature=1.5, max_tokens=32, ignore_eos=True)
        again = client.generate(PROMPTS[1], temperature=1.5, max_tokens=32, ignore_eos=True, seed=first.seed)
        other = client.generate(PROMPTS[1], temperature=1.5, max_tokens=32, ignore_eos=True)
    assert again.token_ids == first.token_ids
    assert other.token_ids != first.token_ids


def test_a_chat(address: str) -> None:
    with Client(address) as client:
        completion = client.chat([{"role": "user", "content": "Hi"}], GREEDY)
        tokenizer = client.tokenizer()
        assert tokenizer is not None
        assert tokenizer.decode(completion.prompt_token_ids) == "[user]Hi"
        assert completion.text == client.generate("[user]Hi", GREEDY).text


def test_stop_tokens_end_the_text(address: str) -> None:
    with Client(address) as client:
        free = client.generate(PROMPTS[0], GREEDY)
        stop = free.token_ids[5]
        stopped = client.generate(PROMPTS[0], GREEDY, stop_token_ids=[stop])
        length = free.token_ids.index(stop) + 1
    assert stopped.token_ids == free.token_ids[:length]
    assert stopped.finish_reason == "stop"
    assert free.text.startswith(stopped.text)


def test_the_door_names_field_limit_and_value(address: str) -> None:
    with Client(address) as client:
        with pytest.raises(InvalidRequest, match="256 tokens") as info:
            client.generate([5] * 256)
        assert (info.value.field, info.value.limit, info.value.value) == ("prompt", 255, 256)
        with pytest.raises(InvalidRequest) as info:
            client.generate([5, VOCAB])
        assert (info.value.field, info.value.value) == ("prompt", VOCAB)
        assert client.generate([5] * 255, GREEDY).usage.completion_tokens == 1


def test_cancelled_requests_make_room(address: str) -> None:
    async def main() -> None:
        async with AsyncClient(address) as client:
            long = SamplingParams(temperature=0.0, ignore_eos=True)
            streams = [client.stream([5, 6, i], long) for i in range(3, 13)]
            for stream in streams:
                assert (await anext(stream)).token_ids
            for stream in streams:
                client.cancel(stream)
            for stream in streams:
                with pytest.raises(RequestCancelled):
                    await stream.result()
            assert (await client.generate([5], GREEDY)).usage.completion_tokens == 24

    asyncio.run(main())
