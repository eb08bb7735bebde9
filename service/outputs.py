"""Rules for a command's outputs: it replaces no file that it reads, and nothing but regular files."""

from collections.abc import Iterable
from pathlib import Path


def check_outputs(inputs: Iterable[Path], outputs: Iterable[Path]) -> None:
    """Raise ValueError if an output is an input (by any path or link), another output, or exists and is not a file."""
    kept = {identity for path in inputs if (identity := _identity(path)) is not None}
    taken: set[Path] = set()
    for output in outputs:
        if _identity(output) in kept:
            raise ValueError(f"{output} is one of the files that are read: write elsewhere")
        if output.exists() and not output.is_file():
            raise ValueError(f"{output} exists and is not a regular file: write elsewhere")
        if (place := output.resolve()) in taken:
            raise ValueError(f"{output} would be written twice: write elsewhere")
        taken.add(place)


def _identity(path: Path) -> tuple[int, int] | None:
    """Identify a file, by any of its names; None: it does not exist."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
