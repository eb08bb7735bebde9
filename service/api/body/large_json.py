"""JSON that holds a few large strings: they stay bytes, and only the little around them is parsed.

Parsing the whole would build what nobody asked for, and hold Python's lock for all of it: 26 MiB with millions of keys
stop every other request for seconds. Here no step holds it for longer than some milliseconds; all steps together take
0.1 s, so they are not for the event loop.
"""

import codecs
import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from service.api.body.encodings import PIECE_BYTES, pieces

LARGE_STRING_BYTES = 4096
MAX_SMALL_BYTES = 64 * 1024
"""Bytes of a document besides its large strings."""
MAX_QUOTES = 2000
MAX_BACKSLASHES = 64
"""In a row, before a quote."""
ESCAPE_BYTES = len(rb"\u002B")

Encoded = bytes | bytearray


@dataclass(frozen=True)
class LargeString:
    """A string as it stands in the document: UTF-8, with its escapes."""

    encoded: Encoded

    def __repr__(self) -> str:
        return f"a string of {len(self.encoded)} bytes"

    def unescaped(self) -> Encoded:
        """Its UTF-8, without the escapes that some encoders write / and + with. ValueError: it has other than ASCII."""
        if b"\\" not in self.encoded:
            return self.encoded
        parts = pieces(self.encoded, b"\\", ESCAPE_BYTES)  # an escaped backslash may be cut in two
        return b"".join(json.loads(b'"' + part + b'"').encode("ascii") for part in parts)


def parse_json(body: Encoded) -> Any:
    """Parse the body as json.loads does, but strings of more than 4 KiB are a LargeString each.

    UTF-8, UTF-16 or UTF-32, with or without a byte order mark. ValueError: it is not JSON, or has more than 64 KiB
    besides its large strings or more than 1,000 strings. RecursionError: it is nested too deeply.
    """
    encoding = json.detect_encoding(body)
    if not encoding.startswith("utf-8"):
        body = _as_utf8(body, encoding)
    quotes = list(_quotes(body))
    token = secrets.token_hex(8)  # no string of the document can be taken for it
    large: dict[str, LargeString] = {}
    small, kept = bytearray(), 0
    for begin, end in zip(quotes[::2], quotes[1::2], strict=False):
        if end - begin > LARGE_STRING_BYTES:
            key = f"{token}{len(large)}"
            large[key] = LargeString(body[begin + 1 : end])
            small += body[kept : begin + 1] + key.encode()
            kept = end
    if len(small) + len(body) - kept > MAX_SMALL_BYTES:
        raise ValueError(f"it has more than {MAX_SMALL_BYTES} bytes besides the image")
    small += body[kept:]
    return _with_strings(json.loads(small), large)


def _as_utf8(body: Encoded, encoding: str) -> bytes:
    decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
    starts = range(0, len(body), PIECE_BYTES)
    pieces = (decoder.decode(body[start : start + PIECE_BYTES], start == starts[-1]) for start in starts)
    return b"".join(piece.encode("utf-8", "surrogatepass") for piece in pieces)


def _quotes(body: Encoded) -> Iterator[int]:
    """The places of the quotes at which strings begin and end. ValueError: there are too many."""
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


def _with_strings(value: Any, large: dict[str, LargeString]) -> Any:
    """The document with its large strings in their places."""
    if isinstance(value, dict):
        return {key: _with_strings(each, large) for key, each in value.items()}
    if isinstance(value, list):
        return [_with_strings(each, large) for each in value]
    return large.get(value, value) if isinstance(value, str) else value
