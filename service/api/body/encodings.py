"""Decoders of text encodings: base64 in the variants that clients send, and MIME's transfer encodings.

No step holds the GIL for longer than some milliseconds. All steps together take up to 0.1 s, so they are not for the
event loop.
"""

import binascii
import re
from collections.abc import Callable, Iterator, Mapping

PIECE_BYTES = 256 * 1024
_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_SPACE = b" \t\r\n"
_URL_ESCAPES = {
    escape: bytes([letter]) for letter in b"+/=" + _SPACE for escape in (b"%%%02X" % letter, b"%%%02x" % letter)
}
"""Base64's letters as a URL escapes them. Unquoting every possible escape would take seconds."""
_FOREIGN = re.compile(rb"[^A-Za-z0-9+/=]")
_DATA_URL = re.compile(rb"\s*data:([^,]{0,200}),", re.IGNORECASE)


def decode_base64(text: bytes | bytearray) -> bytearray:
    """Decode base64 (RFC 4648) in either alphabet, with or without padding, white space and a data URL's prefix.

    ValueError names what is not base64.
    """
    if head := _DATA_URL.match(text):
        if not head[1].lower().endswith(b";base64"):
            raise ValueError("it is a data URL without ;base64")
        text = text[head.end() :]
        if b"%" in text:
            text = b"".join(map(_without_url_escapes, pieces(text, b"%", len(b"%2B"))))
    decoded, rest, has_ended = bytearray(), b"", False
    for start in range(0, len(text), PIECE_BYTES):
        letters = rest + text[start : start + PIECE_BYTES].translate(_URL_SAFE, _SPACE)
        letters, padding, behind = letters.partition(b"=")
        if (has_ended and letters) or behind.strip(b"="):
            raise ValueError("it continues after its padding")
        whole = len(letters) // 4 * 4
        decoded += _groups(letters[:whole])
        rest, has_ended = bytes(letters[whole:]), has_ended or bool(padding)
        if has_ended:
            decoded += _last(rest)
            rest = b""
    return decoded + _last(rest)


def pieces(text: bytes | bytearray, escape: bytes, escape_bytes: int) -> Iterator[bytes | bytearray]:
    """Cut the text into pieces of 256 KiB or a little less. None ends within an escape of at most so many bytes."""
    start = 0
    while start < len(text):
        end = start + max(PIECE_BYTES, 2 * escape_bytes)
        if end < len(text) and (cut := text.rfind(escape, end - escape_bytes + 1, end)) >= 0:
            end = cut
        yield text[start:end]
        start = end


def _without_url_escapes(text: bytes | bytearray) -> bytes | bytearray:
    for escape, letter in _URL_ESCAPES.items():
        text = text.replace(escape, letter)
    return text


def _last(letters: bytes) -> bytes:
    """Decode the two or three letters that fill no group of four."""
    if len(letters) == 1:
        raise ValueError("it is cut off: one letter is left over")
    return _groups(letters + b"=" * (-len(letters) % 4))


def _groups(letters: bytes | bytearray) -> bytes:
    try:
        return binascii.a2b_base64(letters, strict_mode=True)
    except binascii.Error as error:
        foreign = _FOREIGN.search(letters)
        raise ValueError(f"it has the character {foreign[0].decode('latin-1')!r}" if foreign else str(error)) from error


TRANSFER_ENCODINGS: Mapping[str, Callable[[bytearray], bytearray]] = {
    "": lambda data: data,
    "7bit": lambda data: data,
    "8bit": lambda data: data,
    "binary": lambda data: data,
    "base64": decode_base64,
    "quoted-printable": lambda data: bytearray(binascii.a2b_qp(data)),
}
"""Decoders by the Content-Transfer-Encoding (RFC 2045) of a form's part."""
