"""The pictures of a batch job: where they are, and their bytes. A folder of this machine, or of an object store.

A path is absolute, or a URI such as `s3://bucket/photos/1.jpg`. In results, bytes of it that are no UTF-8 are spelled
out.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Self

from pyarrow import fs

from model.formats.signatures import SUFFIXES
from service.config import Settings
from service.detect import other_kind, read_image, refuse_giant


@dataclass(frozen=True)
class Pictures:
    """A folder, or one file. Can be sent to another machine, which must see the same."""

    files: fs.FileSystem
    root: str
    """Absolute path; in an object store BUCKET/PREFIX."""
    scheme: str
    """`s3://` for instance; empty for paths of this machine."""

    @classmethod
    def at(cls, source: str) -> Self:
        """Open SOURCE. ValueError, OSError: there is no such store."""
        files, root = open_store(source)
        return cls(files, root, "" if is_local(files) else source.partition("://")[0] + "://")

    def paths(self) -> list[str]:
        """All pictures, in order of path: what ends like one, on this machine also what begins like one.

        ValueError: there is no SOURCE, or no picture in it.
        """
        found = sorted(self._objects() if self.scheme else _local(Path(self.root)))
        if not found:
            raise ValueError(f"{self.scheme}{self.root} does not exist, or has no images")
        return found

    def read(self, path: str, settings: Settings) -> bytes:
        """One picture's file. InvalidImage: it is no regular file, or larger than any picture of the allowed pixels;
        OSError: it is gone, or cannot be had now."""
        if not self.scheme:
            Path(path).stat()
            return read_image(Path(path), settings)
        with self.files.open_input_file(path.removeprefix(self.scheme)) as file:
            refuse_giant(file.size(), settings)
            return bytes(file.read())

    def _objects(self) -> Iterator[str]:
        """All objects below the prefix whose name ends like a picture's: none is read for this."""
        found = self.files.get_file_info(self.root)
        below = [found] if found.is_file else self.files.get_file_info(_everything_below(self.root))
        yield from (self.scheme + each.path for each in below if each.is_file and _ends_like_one(each.path))


def open_store(place: str) -> tuple[fs.FileSystem, str]:
    """Find the file system of a path or URI, and the path in it. ValueError, OSError: there is none such."""
    if "://" in place:
        files, root = fs.FileSystem.from_uri(place)
        return files, root
    return fs.LocalFileSystem(), os.path.abspath(place)  # noqa: PTH100 (absolute() would keep `..`)


def is_local(files: fs.FileSystem) -> bool:
    return isinstance(files, fs.LocalFileSystem)


def shown(path: str) -> str:
    """Make text of a path that every table holds."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _everything_below(folder: str) -> fs.FileSelector:
    return fs.FileSelector(folder, allow_not_found=True, recursive=True)


def _ends_like_one(path: str) -> bool:
    return path.lower().endswith(SUFFIXES)


def _local(root: Path) -> Iterator[str]:
    """OSError: a folder cannot be looked into."""
    if not root.is_dir():
        yield from [str(root)] if root.exists() else []
        return
    for folder, _, names in os.walk(root, onerror=_raise):
        for file in (Path(folder, name) for name in names):
            if file.is_file() and other_kind(file) is None:
                yield str(file)


def _raise(error: OSError) -> NoReturn:
    raise error
