"""Fixtures of the model's tests: two processes for exports, each of which keeps one core busy for 10 to 30 s."""

import multiprocessing
from collections.abc import Iterator
from multiprocessing.pool import Pool

import pytest


@pytest.fixture(scope="package")
def exporters() -> Iterator[Pool]:
    """Each imports torch once. What nobody waits for any more is ended with them."""
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        yield pool
