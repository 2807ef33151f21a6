"""A program that uses the SDK: `python -m support.audited LOG STRICT support.audited_client ADDRESS STRICT`. Does
everything once, makes the file STRICT, and does it all again."""

from __future__ import annotations

import sys
from pathlib import Path

from tandem import Client


def use(client: Client) -> None:
    chat = [{"role": "system", "content": "{{ 7 * 7 }}"}, {"role": "user", "content": "{% raw %}What is 2 + 2?"}]
    client.generate([chat, "__import__('os').system('true')", "{{ ''.__class__ }}"], max_tokens=8, seed=1)
    for chunk in client.stream("Once upon", max_tokens=8, seed=2):
        assert isinstance(chunk.text, str)
    client.generate([1, 2, 3], max_tokens=4, temperature=0.0)


def main() -> None:
    address, strict = sys.argv[1:]
    with Client(address) as client:
        use(client)
        Path(strict).touch()
        use(client)


if __name__ == "__main__":
    main()
