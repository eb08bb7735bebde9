"""The pictures of a batch job: their paths and bytes, in a folder of this machine or of an object store.

A path is absolute, or a URI such as `s3://bucket/photos/1.jpg`. Results show bytes of it that are not UTF-8 as escapes.
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
    """A folder, or one file. The value can be sent to another machine, which must have the same files."""

    files: fs.FileSystem
    root: str
    """Absolute path, or BUCKET/PREFIX in an object store."""
    scheme: str
    """Scheme, such as `s3://`; empty for paths of this machine."""

    @classmethod
    def at(cls, source: str) -> Self:
        """Open SOURCE. ValueError, OSError: the store does not exist."""
        files, root = open_store(source)
        return cls(files, root, "" if is_local(files) else source.partition("://")[0] + "://")

    def paths(self) -> list[str]:
        """Return all pictures, in order of path: by their file endings, on this machine also by their first bytes.

        ValueError: SOURCE does not exist, or has no picture.
        """
        found = sorted(self._objects() if self.scheme else _local(Path(self.root)))
        if not found:
            raise ValueError(f"{self.scheme}{self.root} does not exist, or has no images")
        return found

    def read(self, path: str, settings: Settings) -> bytes:
        """Read one picture's file. InvalidImage: it is no regular file, or larger than a picture of the allowed pixels.
        OSError: it is gone, or cannot be read now."""
        if not self.scheme:
            Path(path).stat()
            return read_image(Path(path), settings)
        with self.files.open_input_file(path.removeprefix(self.scheme)) as file:
            refuse_giant(file.size(), settings)
            return bytes(file.read())

    def _objects(self) -> Iterator[str]:
        """Return all objects below the prefix with a picture's file ending, without reading them."""
        found = self.files.get_file_info(self.root)
        below = [found] if found.is_file else self.files.get_file_info(_everything_below(self.root))
        yield from (self.scheme + each.path for each in below if each.is_file and _ends_like_one(each.path))


def open_store(place: str) -> tuple[fs.FileSystem, str]:
    """Find the file system of a path or URI, and the path in it. ValueError, OSError: there is none."""
    if "://" in place:
        files, root = fs.FileSystem.from_uri(place)
        return files, root
    return fs.LocalFileSystem(), os.path.abspath(place)  # noqa: PTH100 (absolute() would keep `..`)


def is_local(files: fs.FileSystem) -> bool:
    return isinstance(files, fs.LocalFileSystem)


def shown(path: str) -> str:
    """Make text of a path that any table can hold."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _everything_below(folder: str) -> fs.FileSelector:
    return fs.FileSelector(folder, allow_not_found=True, recursive=True)


def _ends_like_one(path: str) -> bool:
    return path.lower().endswith(SUFFIXES)


def _local(root: Path) -> Iterator[str]:
    """Yield the pictures of a local folder, or the file itself. OSError: a folder cannot be read."""
    if not root.is_dir():
        yield from [str(root)] if root.exists() else []
        return
    for folder, _, names in os.walk(root, onerror=_raise):
        for file in (Path(folder, name) for name in names):
            if file.is_file() and other_kind(file) is None:
                yield str(file)


def _raise(error: OSError) -> NoReturn:
    raise error
