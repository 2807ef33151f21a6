"""Generated JSON schemas with the built-in model: what is finished follows its schema, and most is finished."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import jsonschema

from tandem import AsyncClient
from tandem.launch.embedded import EmbeddedSystem

from support.profiles import examples
from support.schemas import bounded_schema

MAX_TOKENS = 400
AT_ONCE = 32


def test_outputs_follow_their_schemas() -> None:
    count = examples(ci=60, nightly=1_000)
    schemas = [bounded_schema(seed) for seed in range(count)]

    async def run(address: str) -> list[str | None]:
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

    with EmbeddedSystem({"device": "cpu", "max_num_seqs": AT_ONCE}) as system:
        answers = asyncio.run(run(system.address))
    finished = 0
    for schema, answer in zip(schemas, answers, strict=True):
        if answer is not None:
            finished += 1
            validator = jsonschema.Draft202012Validator
            validator(schema, format_checker=validator.FORMAT_CHECKER).validate(json.loads(answer))
    print(f"{finished} of {count} finished, and all of these follow their schemas")
    assert finished >= 0.9 * count
