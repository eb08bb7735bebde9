"""How much memory decoding may take, by the limit of a container or machine."""

from pathlib import Path

import pytest

from service.core.memory import BYTES_PER_DECODER, memory_limit

GIB = 2**30


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"memory.max": "1073741824\n"}, GIB),
        ({"memory/memory.limit_in_bytes": "536870912\n"}, GIB // 2),
        ({"memory.max": "max\n"}, None),
        ({}, None),
    ],
)
def test_the_limit_is_the_container_s_or_the_machine_s(
    tmp_path: Path, files: dict[str, str], limit: int | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    machine = memory_limit(tmp_path / "nothing")
    assert machine > BYTES_PER_DECODER
    assert memory_limit(tmp_path) == (machine if limit is None else limit)
