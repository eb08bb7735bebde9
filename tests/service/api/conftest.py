"""One server for the tests of a module."""

from collections.abc import Iterator

import pytest

from tests.support.serving import FakeDetector, Serving, serving


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving(FakeDetector()) as running:
        yield running
