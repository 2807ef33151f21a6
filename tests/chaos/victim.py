"""`python victim.py ADDRESS ACCESS COUNT`: a client with so many long streams, one after the other, until it is killed.
ACCESS: how it gets in, as JSON."""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from typing import Any

from tandem import AsyncClient, TandemError


async def main(address: str, access: dict[str, Any], count: int) -> None:
    async with AsyncClient(address, connect_timeout=None, reconnect_timeout=None, **access) as client:

        async def stream(number: int) -> None:
            for turn in itertools.count():
                try:
                    prompt = [5 + number, 6 + turn % 50, 7]
                    await client.generate(prompt, temperature=1.0, seed=turn, max_tokens=400, ignore_eos=True)
                except TandemError as error:
                    print(f"stream {number}: {error!r}", flush=True)

        await asyncio.gather(*(stream(number) for number in range(count)))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])))
