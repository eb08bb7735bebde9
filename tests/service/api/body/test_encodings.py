"""Base64 as people write it, compared with Python's own."""

import base64
import random

import pytest

from service.api.body import encodings
from service.api.body.encodings import TRANSFER_ENCODINGS, decode_base64

DATA = random.Random(0).randbytes(10_001)
TEXT = base64.b64encode(DATA)
DIALECTS = {
    "plain": TEXT,
    "MIME, lines of 76": base64.encodebytes(DATA),
    "MIME, lines that end in CRLF": base64.encodebytes(DATA).replace(b"\n", b"\r\n"),
    "URL-safe": base64.urlsafe_b64encode(DATA),
    "without padding": TEXT.rstrip(b"="),
    "a data URL": b"data:image/jpeg;base64," + TEXT,
    "a data URL with parameters": b' DATA:image/svg+xml;charset="x";BASE64,' + TEXT,
    "a data URL, escaped": b"data:;base64," + TEXT.replace(b"+", b"%2B").replace(b"/", b"%2f").replace(b"=", b"%3D"),
    "with a line break behind": TEXT + b"\n",
}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("piece", [encodings.PIECE_BYTES, 1000, 7, 1])
def test_every_dialect_is_read(dialect: str, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encodings, "PIECE_BYTES", piece)
    assert decode_base64(DIALECTS[dialect]) == DATA


@pytest.mark.parametrize("length", range(9))
def test_every_length_is_read(length: int) -> None:
    for text in (base64.b64encode(DATA[:length]), base64.b64encode(DATA[:length]).rstrip(b"=")):
        assert decode_base64(text) == DATA[:length]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"abc!", "'!'"),
        ("ä".encode(), "the character"),
        (b"abcde", "cut off"),
        (b"ab==cdef", "continues after its padding"),
        (b"data:image/png,abcd", "without ;base64"),
    ],
)
def test_what_is_no_base64_is_said(text: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        decode_base64(text)


def test_what_goes_on_behind_its_padding_is_found_across_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encodings, "PIECE_BYTES", 4)
    with pytest.raises(ValueError, match="padding"):
        decode_base64(b"YWI=YWJj")


def test_quoted_printable_is_undone() -> None:
    assert TRANSFER_ENCODINGS["quoted-printable"](bytearray(b"a=FF=\r\nb=3D")) == b"a\xffb="
