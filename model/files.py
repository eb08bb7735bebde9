"""Files that appear whole or not at all: they are written under a temporary name in the same folder, then renamed. Also
a stamp that tells one version of a file from the next."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

Stamp = tuple[int, ...] | None


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Yield a temporary path in the file's folder, which is renamed to the file when the block ends.

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
    """Return a value that changes with the file's version or permissions; None: it is missing or cannot be read."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino, status.st_mode, status.st_uid, status.st_gid
