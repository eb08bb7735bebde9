"""A streaming parser of multipart/form-data: RFC 7578 over RFC 2046, with preamble, padded boundaries, folded headers.

`feed` takes the next bytes, in pieces of any size. It yields each part's headers and then its data, in pieces. The
parser keeps less than MAX_HEADER_BYTES between calls.
"""

import re
from collections.abc import Iterator, Mapping

MAX_BOUNDARY_BYTES = 256
"""Longest boundary; RFC 2046 allows 70 bytes."""
MAX_PADDING_BYTES = 256
MAX_HEADER_BYTES = 16 * 1024
"""Most bytes of all headers of one part."""
_FOLD = re.compile(rb"\r\n[ \t]+")

Headers = Mapping[bytes, bytes]
"""Header values by their names in lower case."""


class MultipartParser:
    """Parser of one body. ValueError from `feed` or the constructor: the body or the boundary is malformed."""

    def __init__(self, boundary: bytes) -> None:
        if not 0 < len(boundary) <= MAX_BOUNDARY_BYTES:
            raise ValueError(f"a boundary has 1 to {MAX_BOUNDARY_BYTES} bytes, not {len(boundary)}")
        line = b"\r\n--" + re.escape(boundary)
        self._delimiter = re.compile(line + rb"(--|[ \t]{0,%d}\r\n)" % MAX_PADDING_BYTES)
        self._undecided_bytes = 4 + len(boundary) + MAX_PADDING_BYTES + 2
        """Bytes at the end of the received data that may begin a delimiter."""
        self._buffer = bytearray(b"\r\n")  # the first boundary may stand at the very beginning
        self._in_part = self._in_headers = False
        self.ended = False

    def feed(self, chunk: bytes) -> Iterator[Headers | bytes]:
        self._buffer += chunk
        while not self.ended:
            if self._in_headers:
                headers = self._take_headers()
                if headers is None:
                    return
                yield headers
            found = self._delimiter.search(self._buffer)
            end = found.start() if found else max(0, len(self._buffer) - self._undecided_bytes)
            if self._in_part and end:
                yield bytes(self._buffer[:end])
            if found is None:
                del self._buffer[:end]
                return
            self.ended = found[1] == b"--"
            self._in_headers = self._in_part = not self.ended
            del self._buffer[: found.end()]
        self._buffer.clear()  # the epilogue

    def _take_headers(self) -> Headers | None:
        """Take the next part's headers; None: they have not come yet."""
        end = 0 if self._buffer.startswith(b"\r\n") else self._buffer.find(b"\r\n\r\n")
        if end > MAX_HEADER_BYTES or (end < 0 and len(self._buffer) > MAX_HEADER_BYTES):
            raise ValueError(f"a part's headers have more than {MAX_HEADER_BYTES} bytes")
        if end < 0 or len(self._buffer) < 2:
            return None
        headers: dict[bytes, bytes] = {}
        for line in _FOLD.sub(b" ", bytes(self._buffer[:end])).split(b"\r\n") if end else ():
            name, colon, value = line.partition(b":")
            if not colon or not name.strip():
                raise ValueError(f"a part has the header {line[:80].decode('latin-1')!r}, which has no name")
            headers.setdefault(name.strip().lower(), value.strip())
        del self._buffer[: end + (4 if end else 2)]
        self._in_headers = False
        return headers
