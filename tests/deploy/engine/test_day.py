"""Every line of the operator's pages, typed on an engine: none fails."""

from pathlib import Path

from tests.deploy.engine.day import Day, live
from tests.deploy.engine.stack import needs_engine
from tests.support.load import free_ports

pytestmark = needs_engine


def test_every_line_that_the_pages_tell_an_operator_to_type_works(images: dict[str, str], tmp_path: Path) -> None:
    day = Day(tmp_path, *free_ports(3))
    day.prepare()
    typed = 0
    try:
        for block, code, output in live(day):
            assert code == 0, f"{block}\n{output}"
            typed += len(block.lines)
    finally:
        day.type("docker compose down --volumes --timeout 5")
    assert typed > 40
