"""One service with HTTP for all tests here."""

from collections.abc import Iterator

import pytest

from support.gateway import Served, service


@pytest.fixture(scope="session")
def served() -> Iterator[Served]:
    with service() as found:
        yield found
