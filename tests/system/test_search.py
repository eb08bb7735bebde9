"""The costliest files that a brief search finds are within their bounds; `python -m tests.search` is the long one."""

from math import inf
from random import Random
from typing import cast

import pytest

from service.core.decoders import LEAST_BYTES
from tests.search.__main__ import main
from tests.search.climb import Species, climb
from tests.search.cost import Cost, Meter


@pytest.mark.slow
def test_the_costliest_file_of_each_format_is_within_its_bounds(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["--seconds", "0.5", "--pixels", "2000000"])
    said = capsys.readouterr().out
    assert code == 0, said
    assert {line.split()[0] for line in said.splitlines()} == {"JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "AVIF"}


class Hill:
    """Costs that grow where two genes fit each other, which no single draw does."""

    def cost(self, data: bytes) -> Cost:
        count, size = data.count(b"a"), data.count(b"b")
        return Cost(claim=0, time=count - abs(count - 10 * size), memory=0)


def test_a_search_climbs_and_keeps_to_the_size() -> None:
    species = Species({"count": (0, 10_000), "size": (0, 10_000)}, lambda g: b"a" * g["count"] + b"b" * g["size"])
    meter = cast("Meter", Hill())
    found = climb(species, meter, 8_000, inf, Random(0), lambda cost: cost.time)
    assert max(each.cost.time for each in found) > 4_000 > found[0].cost.time
    assert max(each.size for each in found) <= 8_000


@pytest.mark.slow
def test_the_limit_of_a_small_file_is_not_that_of_the_next() -> None:
    with Meter(2_000_000) as meter:
        costs = [meter.cost(bytes(size)) for size in (1, LEAST_BYTES + 2**20)]
    assert all(cost.time < inf for cost in costs), costs
