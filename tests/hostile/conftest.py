from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.siege import Siege


@pytest.fixture(scope="session")
def siege() -> Iterator[Siege]:
    """One scheduler process, over TCP with keys, for all attacks."""
    with Siege() as made:
        yield made
