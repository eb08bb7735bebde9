"""A parser of JSON with a few large strings or arrays of numbers: these stay bytes, and only the rest is parsed.

Parsing the whole would hold the GIL: 26 MiB with millions of keys would stop every other request for seconds. Here no
step holds it for longer than some milliseconds. All steps together take 0.1 s, with numbers a second, so they are not
for the event loop.
"""

import codecs
import itertools
import json
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from service.api.body.encodings import PIECE_BYTES, pieces

LARGE_BYTES = 4096
"""Size from which strings and arrays stay bytes."""
MAX_SMALL_BYTES = 64 * 1024
"""Bytes of a document besides its large strings."""
MAX_QUOTES = 2000
MAX_BACKSLASHES = 64
"""Most backslashes in a row before a quote."""
NUMBERS_BYTES = 64 * 1024
_UINT8S = re.compile(rb"(?:[\[\s]*+\d{1,3}[\]\s]*+,)*+[\[\s]*+\d{1,3}[\]\s]*+")
ESCAPE_BYTES = len(rb"\u002B")

Encoded = bytes | bytearray


@dataclass(frozen=True)
class LargeString:
    """A string of the document as bytes: UTF-8, with its escapes."""

    encoded: Encoded

    def __repr__(self) -> str:
        return f"a string of {len(self.encoded)} bytes"

    def unescaped(self) -> Encoded:
        """Return the text without the escapes that some encoders use for / and +. ValueError: it is not ASCII."""
        if b"\\" not in self.encoded:
            return self.encoded
        parts = pieces(self.encoded, b"\\", ESCAPE_BYTES)  # an escaped backslash may be cut in two
        return b"".join(json.loads(b'"' + part + b'"').encode("ascii") for part in parts)


@dataclass(frozen=True)
class LargeNumbers:
    """An array of the document as bytes. It may hold arrays, or other values than numbers."""

    encoded: Encoded

    def __repr__(self) -> str:
        return f"an array of {len(self.encoded)} bytes"

    def as_uint8(self, count: int) -> bytearray:
        """Return its numbers, flattened. ValueError: they are not `count` whole numbers up to 255."""
        numbers = bytearray()
        for piece in self._pieces():
            if _UINT8S.fullmatch(piece) is None:
                raise ValueError("it has other than whole numbers from 0 to 255")
            values = np.fromstring(piece.translate(None, b"[] \t\r\n").decode(), np.uint16, sep=",")
            if values.max() > 255:
                raise ValueError(f"it has the number {values.max()}, and 255 is the largest")
            numbers += values.astype(np.uint8).tobytes()
            if len(numbers) > count:
                break
        if len(numbers) != count:
            raise ValueError(f"it has not the {count} numbers of its shape")
        return numbers

    def _pieces(self) -> Iterator[Encoded]:
        """Cut the array at commas. ValueError: commas are missing where numbers have them."""
        start = 0
        while start < len(self.encoded):
            last = len(self.encoded) - start <= NUMBERS_BYTES
            end = len(self.encoded) if last else self.encoded.rfind(b",", start, start + NUMBERS_BYTES)
            if end < 0:
                raise ValueError("it has other than whole numbers from 0 to 255")
            yield self.encoded[start:end]
            start = end + 1


def parse_json(body: Encoded) -> Any:
    """Parse as json.loads does, but turn strings of more than 4 KiB into LargeString and arrays into LargeNumbers.

    UTF-8, UTF-16 or UTF-32, with or without a byte order mark. ValueError: it is not JSON, or has more than 64 KiB
    besides these or more than 1,000 strings. RecursionError: it is nested too deeply.
    """
    encoding = json.detect_encoding(body)
    if not encoding.startswith("utf-8"):
        body = _as_utf8(body, encoding)
    token = secrets.token_hex(8)  # no string of the document can be taken for it
    large: dict[str, LargeString | LargeNumbers] = {}
    small, kept = bytearray(), 0
    for begin, end, value in _large_values(body):
        key = f"{token}{len(large)}"
        large[key] = value
        small += body[kept:begin] + b'"' + key.encode() + b'"'
        kept = end
    if len(small) + len(body) - kept > MAX_SMALL_BYTES:
        raise ValueError(f"it has more than {MAX_SMALL_BYTES} bytes besides the image")
    small += body[kept:]
    return _with_large(json.loads(small), large)


def _large_values(body: Encoded) -> Iterator[tuple[int, int, LargeString | LargeNumbers]]:
    """Find (begin, end, value) of each large string, quotes included, and of each array between two strings."""
    quotes = list(_quotes(body))
    edges = [0, *quotes, len(body)]
    for number, (begin, end) in enumerate(itertools.pairwise(edges)):
        is_string, has_ended = number % 2 == 1, number < len(quotes)
        if end - begin <= LARGE_BYTES:
            continue
        if is_string and has_ended:
            yield begin, end + 1, LargeString(body[begin + 1 : end])
        elif not is_string and (first := body.find(b"[", begin, end)) >= 0:
            brace = body.find(b"}", first, end)
            last = body.rfind(b"]", first, end if brace < 0 else brace)
            if last - first > LARGE_BYTES:
                yield first, last + 1, LargeNumbers(body[first : last + 1])


def _as_utf8(body: Encoded, encoding: str) -> bytes:
    decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
    starts = range(0, len(body), PIECE_BYTES)
    pieces = (decoder.decode(body[start : start + PIECE_BYTES], start == starts[-1]) for start in starts)
    return b"".join(piece.encode("utf-8", "surrogatepass") for piece in pieces)


def _quotes(body: Encoded) -> Iterator[int]:
    """Find the positions of the quotes at which strings begin and end. ValueError: there are too many."""
    position = -1
    for _ in range(MAX_QUOTES):
        position = body.find(b'"', position + 1)
        if position < 0:
            return
        before = body[max(0, position - MAX_BACKSLASHES) : position]
        backslashes = len(before) - len(before.rstrip(b"\\"))
        if backslashes == MAX_BACKSLASHES:
            raise ValueError(f"it has {MAX_BACKSLASHES} backslashes in a row")
        if backslashes % 2 == 0:
            yield position
    raise ValueError(f"it has more than {MAX_QUOTES // 2} strings")


def _with_large(value: Any, large: dict[str, LargeString | LargeNumbers]) -> Any:
    """Put the large values of the document into their places."""
    if isinstance(value, dict):
        return {key: _with_large(each, large) for key, each in value.items()}
    if isinstance(value, list):
        return [_with_large(each, large) for each in value]
    return large.get(value, value) if isinstance(value, str) else value
