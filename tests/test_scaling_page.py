"""The arithmetic of docs/scaling.md follows from the measured figures that it names."""

import re
from math import ceil
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
UTILISATION = 0.7
RATES = (10, 100, 1000)


def rows(heading: str) -> dict[str, list[float]]:
    """The numbers of the section's table by their row's first cell."""
    section = (DOCS / "scaling.md").read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    cells = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| ")]
    found = {first.strip(): [cell.strip(" *").replace(",", "") for cell in rest] for first, *rest in cells}
    return {name: [float(cell) for cell in rest] for name, rest in found.items() if re.fullmatch(r"[\d.]+", rest[0])}


REPLICAS = rows("Replicas for a rate")
HOURS = rows("What a picture costs")


@pytest.mark.parametrize("replica", REPLICAS)
def test_the_replicas_for_a_rate_are_those_of_the_formula(replica: str) -> None:
    speed, *replicas = REPLICAS[replica]
    assert replicas == [ceil(rate / (UTILISATION * speed)) for rate in RATES]


def test_the_hours_of_a_million_pictures_are_those_of_the_formula() -> None:
    speeds = [speed for speed, *_ in REPLICAS.values()]
    assert len(HOURS) == len(speeds) == 4
    for [hours], speed in zip(HOURS.values(), speeds, strict=True):
        assert hours == pytest.approx(1e6 / (3600 * UTILISATION * speed), rel=0.01)


@pytest.mark.parametrize("figure", ["| 11.25 |", "| 0.67 |", "| 2.98 × |", "| 22.37 | 358 |", "| 10.40 |", "| 41.17 |"])
def test_a_measured_figure_is_in_the_benchmarks(figure: str) -> None:
    assert figure in (DOCS / "benchmarks.md").read_text()
