"""A file is written whole or not at all, and nothing half-written is left beside it."""

from pathlib import Path

import pytest

from model.files import replacing, write_whole


def test_a_file_is_replaced_by_what_is_written(tmp_path: Path) -> None:
    for content in (b"old", b"new"):
        write_whole(tmp_path / "index.html", content)
        assert [each.read_bytes() for each in tmp_path.iterdir()] == [content]


def test_a_file_that_cannot_be_written_whole_stays_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "index.html"
    write_whole(file, b"old")
    with pytest.raises(TypeError):
        write_whole(file, "no bytes")  # type: ignore[arg-type]
    assert [each.read_bytes() for each in tmp_path.iterdir()] == [b"old"]


def test_until_the_block_ends_the_old_file_is_there(tmp_path: Path) -> None:
    file = tmp_path / "detector.onnx"
    write_whole(file, b"old")
    with pytest.raises(RuntimeError, match="checked and found wrong"), replacing(file) as temporary:
        temporary.write_bytes(b"half of it")
        assert (temporary.parent, file.read_bytes()) == (tmp_path, b"old")
        raise RuntimeError("checked and found wrong")
    assert [each.read_bytes() for each in tmp_path.iterdir()] == [b"old"]
