"""Files that appear whole or not at all: written beside their place under a temporary name, then renamed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Give a temporary path in the file's folder; what is there takes the file's name when the block ends.

    After an exception the temporary file is removed and `file` is as it was.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(file: Path, content: bytes) -> None:
    """Write the file, or leave the old one as it was."""
    with replacing(file) as temporary:
        temporary.write_bytes(content)
