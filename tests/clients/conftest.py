"""One service with HTTP for all tests here; other people's programs run as processes of their own."""

from collections.abc import Iterator

import pytest

from support.gateway import Served, service


@pytest.fixture(scope="session")
def served() -> Iterator[Served]:
    with service() as found:
        yield found
