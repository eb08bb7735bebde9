"""API keys: those of the setting, and those of a file, which is read again when it changes.

A line of the file is `name:key`; empty lines and lines that begin with # are skipped. A name may have several keys, for
a rotation. Names go into the log; keys do not.
"""

import hmac
import logging
import re
import time
from collections.abc import Sequence
from pathlib import Path

from model.files import stamp_of

logger = logging.getLogger(__name__)

MIN_KEY_CHARACTERS = 16
LOOK_SECONDS = 1.0
LINE = re.compile(rf"([A-Za-z0-9._-]{{1,64}}):([!-~]{{{MIN_KEY_CHARACTERS},}})")
"""A line of the file. A key is ASCII without spaces, because a header must carry it."""

NamedKey = tuple[str, bytes]


class InvalidKeys(Exception):
    """The file cannot be read, holds no key, or has an invalid line. The message names the line, never its text."""


def read_keys(path: Path) -> list[NamedKey]:
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidKeys(f"cannot read the API keys in {path}: {getattr(error, 'strerror', None) or error}") from error
    keys = []
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        found = LINE.fullmatch(line)
        if found is None:
            raise InvalidKeys(f"line {number} of {path} is not NAME:KEY with a key of {MIN_KEY_CHARACTERS} characters")
        keys.append((found[1], found[2].encode()))
    if not keys:
        raise InvalidKeys(f"{path} holds no API key")
    return keys


class ApiKeys:
    """The valid keys, and whose they are. For the event loop alone. InvalidKeys: the file is invalid at the start."""

    def __init__(self, keys: Sequence[str], path: Path | None, look_seconds: float = LOOK_SECONDS) -> None:
        self._fixed = [(f"key-{number}", key.encode()) for number, key in enumerate(keys, 1)]
        self._path = path
        self._look_seconds = look_seconds
        self._stamp = stamp_of(path) if path else None
        self._from_file = read_keys(path) if path else []
        self._looked = time.monotonic()

    def __bool__(self) -> bool:
        """Tell whether a request needs a key."""
        return bool(self._fixed or self._path)

    def name_of(self, given: str) -> str | None:
        """Return the name of this key; None: it is not valid. It is compared with every key, in constant time."""
        if self._path is not None and time.monotonic() >= self._looked + self._look_seconds:
            self._read_again(self._path)
        matches = [n for n, key in (*self._fixed, *self._from_file) if hmac.compare_digest(given.encode(), key)]
        return matches[0] if matches else None

    def _read_again(self, path: Path) -> None:
        """Read the file's keys if it has changed. While it is invalid (half written, gone) the old keys stay valid."""
        self._looked = time.monotonic()
        stamp = stamp_of(path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._from_file = read_keys(path)
        except InvalidKeys as error:
            logger.error("the API keys are as they were: %s", error)
        else:
            names = sorted({name for name, _ in self._from_file})
            logger.info("read %d API keys again, of %s", len(self._from_file), ", ".join(names))
