"""Generated JSON schemas with the built-in model: what is finished follows its schema, and most is finished."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tandem import AsyncClient

from support.commands import tandem
from support.profiles import examples
from support.schemas import bounded_schema
from support.systems import embedded

pytestmark = pytest.mark.thorough

MAX_TOKENS = 400
AT_ONCE = 32


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with embedded({"device": "cpu", "max_num_seqs": AT_ONCE}) as system:
        yield system.address


def test_outputs_follow_their_schemas(address: str) -> None:
    count = examples(ci=60, nightly=1_000)
    schemas = [bounded_schema(seed) for seed in range(count)]

    async def run() -> list[str | None]:
        """Each answer's text, None if it met max_tokens."""
        turn = asyncio.Semaphore(AT_ONCE)

        async def one(client: AsyncClient, seed: int, schema: dict[str, Any]) -> str | None:
            async with turn:
                done = await client.generate(
                    [{"role": "user", "content": f"Give me a JSON object of number {seed}."}],
                    structured_outputs={"json": schema},
                    seed=seed,
                    max_tokens=MAX_TOKENS,
                )
            return done.text if done.finish_reason == "stop" else None

        async with AsyncClient(address) as client:
            return await asyncio.gather(*(one(client, seed, schema) for seed, schema in enumerate(schemas)))

    answers = asyncio.run(run())
    finished = 0
    for schema, answer in zip(schemas, answers, strict=True):
        if answer is not None:
            finished += 1
            validator = jsonschema.Draft202012Validator
            validator(schema, format_checker=validator.FORMAT_CHECKER).validate(json.loads(answer))
    print(f"{finished} of {count} finished, and all of these follow their schemas")
    assert finished >= 0.9 * count


def test_the_command_line_asks_for_every_kind(address: str, tmp_path: Path) -> None:
    schema, grammar = tmp_path / "schema.json", tmp_path / "grammar.lark"
    schema.write_text('{"const": 7}')
    grammar.write_text('start: "ab" "c"\n')
    for flags, answers in (
        (["--json-schema", str(schema), "--max-tokens", "50"], {"7"}),
        (["--regex", "x{3}"], {"xxx"}),
        (["--choice", "yes", "--choice", "no"], {"yes", "no"}),
        (["--grammar", str(grammar)], {"abc"}),
    ):
        with tandem("generate", "--connect", address, "--raw", *flags, "hello", environment={}) as command:
            assert command.finish() == 0
            assert command.output.strip() in answers


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 0.7, "top_p": 0.9}])
def test_a_grammar_that_allows_everything_changes_nothing(address: str, sampling: dict[str, Any]) -> None:
    """Beside requests with another one, in one batch."""
    prompts = ["Once upon a time", "3 + 4 =", "My name is", "def"]

    async def run() -> tuple[list[str], list[str], str]:
        async with AsyncClient(address) as client:
            plain = [client.generate(prompt, seed=5, max_tokens=48, **sampling) for prompt in prompts]
            anything = {"regex": "(?s:.*)"}
            free = [
                client.generate(prompt, seed=5, max_tokens=48, structured_outputs=anything, **sampling)
                for prompt in prompts
            ]
            bound = client.generate("x", structured_outputs={"regex": "[ab]{40}"}, temperature=0.0)
            done = await asyncio.gather(*plain, *free, bound)
            texts = [one.text for one in done]
            return texts[:4], texts[4:8], texts[8]

    plain, free, bound = asyncio.run(run())
    assert free == plain
    assert len(bound) == 40
