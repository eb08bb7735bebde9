"""Files that appear whole or not at all, written beside their place under a temporary name, then renamed; and how one
version of a file is told from the next."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

Stamp = tuple[int, ...] | None


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


def stamp_of(file: Path) -> Stamp:
    """Tell one version of the file from the next, by its rights too; None while there is none to be seen."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino, status.st_mode, status.st_uid, status.st_gid
