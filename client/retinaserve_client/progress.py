"""A progress bar, if tqdm is installed and standard error is a terminal."""

from collections.abc import Iterable, Sized
from typing import Protocol


class Progress(Protocol):
    def update(self) -> object: ...
    def close(self) -> object: ...


class NoProgress:
    def update(self) -> None:
        pass

    def close(self) -> None:
        pass


def progress_of(images: Iterable[object]) -> Progress:
    try:
        from tqdm import tqdm
    except ImportError:
        return NoProgress()
    total = len(images) if isinstance(images, Sized) else None
    bar: Progress = tqdm(total=total, unit="image", disable=None)
    return bar
