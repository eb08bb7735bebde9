"""Strict reading of a JSON entry's fields: a number must be finite (its text is accepted too), an integer whole.

The error names the file, the entry and the field.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LARGEST_ID = 2**63 - 1
SHOWN_CHARACTERS = 60
"""Characters of a bad value that an error shows."""


class InvalidDataSet(ValueError):
    """The folder is not a usable COCO-format data set; the text says what is wrong and where."""


class Fields:
    """One entry of a file's list. InvalidDataSet, from each method: the field is missing or has a wrong value."""

    __slots__ = ("_entry", "_file", "_index", "_kind")

    def __init__(self, file: Path, kind: str, index: int, entry: Any) -> None:
        """Read an entry. `index` is its position in the list, from 0."""
        self._file, self._kind, self._index, self._entry = file, kind, index, entry
        if not isinstance(entry, Mapping):
            raise InvalidDataSet(f"{file} is not COCO JSON: {kind} at index {index} is {shown(entry)}, not an object")

    @property
    def name(self) -> str:
        """Kind and id; without an id, its position."""
        known = self._entry.get("id") is not None
        return f"{self._kind} {shown(self._entry['id'])}" if known else f"{self._kind} at index {self._index}"

    def refuse(self, reason: str) -> InvalidDataSet:
        """Make the error to raise."""
        return InvalidDataSet(f"{self._file}: {self.name}: {reason}")

    def value(self, name: str) -> Any:
        try:
            return self._entry[name]
        except KeyError as error:
            raise self.refuse(f"there is no {name}") from error

    def get(self, name: str) -> Any:
        """Return the value unchanged; None: it is absent."""
        return self._entry.get(name)

    def whole(self, name: str) -> int:
        """Read an integer that fits 64 bits."""
        value = self.value(name)
        try:
            number = value if isinstance(value, int) else int(value) if isinstance(value, str) else _whole(value)
        except ValueError as error:
            raise self.refuse(f"{name} is {shown(value)}, not a whole number") from error
        if abs(number) > LARGEST_ID:
            raise self.refuse(f"{name} is {shown(value)}, beyond 64 bits")
        return number

    def text(self, name: str) -> str:
        """Read text that is not empty; a number becomes its digits."""
        value = self.value(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str) or not value:
            raise self.refuse(f"{name} is {shown(value)}, not text")
        return value

    def box(self, name: str) -> tuple[float, float, float, float]:
        """Read four finite numbers."""
        value = self.value(name)
        if not isinstance(value, list) or len(value) != 4:
            raise self.refuse(f"{name} is {shown(value)}, not [x, y, width, height]")
        try:
            x, y, width, height = (_finite(part) for part in value)
        except ValueError as error:
            raise self.refuse(f"{name} is {shown(value)}, not four finite numbers") from error
        return x, y, width, height

    def number_or_none(self, name: str) -> float | None:
        """Read a finite number; None: the field is absent or null."""
        value = self.get(name)
        if value is None:
            return None
        try:
            return _finite(value)
        except ValueError as error:
            raise self.refuse(f"{name} is {shown(value)}, not a finite number") from error

    def flag(self, name: str) -> bool:
        """Read 0 or 1, false or true; absent and null are false."""
        value = self.get(name)
        number = float(value) if isinstance(value, bool) else self.number_or_none(name)
        if number not in (None, 0, 1):
            raise self.refuse(f"{name} is {shown(value)}, neither 0 nor 1")
        return bool(number)


def shown(value: Any) -> str:
    """Show a value in an error: on one line, truncated if it is long."""
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"


def _whole(value: Any) -> int:
    number = _finite(value)
    if not number.is_integer():
        raise ValueError(value)
    return int(number)


def _finite(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(value)
    try:
        number = float(value)
    except OverflowError as error:
        raise ValueError(value) from error
    if not math.isfinite(number):
        raise ValueError(value)
    return number
