"""Forms as RFC 7578 and 2046 allow them, in pieces of every size; Python's email package is the second reader."""

import email
import email.mime.image
import email.mime.multipart
import random

import pytest

from service.api.body.multipart import Headers, MultipartParser
from service.api.uploads import MalformedRequest, MultipartImages, UnsupportedMediaType

HEAD = b'Content-Disposition: form-data; name="image"; filename="a"'


def parts(body: bytes, size: int = 2**20, boundary: bytes = b"b") -> list[tuple[Headers, bytes]]:
    parser, found = MultipartParser(boundary), list[tuple[Headers, bytearray]]()
    for start in range(0, len(body), size):
        for event in parser.feed(body[start : start + size]):
            if isinstance(event, bytes):
                found[-1][1].extend(event)
            else:
                found.append((event, bytearray()))
    assert parser.ended
    return [(headers, bytes(data)) for headers, data in found]


def images(body: bytes, **limits: int) -> list[bytearray]:
    form = MultipartImages(b"b", **({"max_images": 9, "max_image_bytes": 2**20} | limits))
    form.feed(body)
    return form.finish()


FORMS = {
    "plain": b"--b\r\n" + HEAD + b"\r\n\r\ndata\r\n--b--\r\n",
    "a preamble": b"This is a message\r\nin MIME format.\r\n--b\r\n" + HEAD + b"\r\n\r\ndata\r\n--b--",
    "a preamble with a false boundary": b"--a\r\n--bb\r\n--b\r\n" + HEAD + b"\r\n\r\ndata\r\n--b--",
    "line breaks before": b"\r\n\r\n--b\r\n" + HEAD + b"\r\n\r\ndata\r\n--b--",
    "padding": b"--b \t \r\n" + HEAD + b"\r\n\r\ndata\r\n--b--   \r\n",
    "an epilogue": b"--b\r\n" + HEAD + b"\r\n\r\ndata\r\n--b--\r\nbehind\r\n--b\r\nX: y\r\n\r\nz",
    "folded headers": b"--b\r\n" + HEAD.replace(b"; ", b";\r\n\t") + b"\r\n\r\ndata\r\n--b--",
    "headers in any case": b"--b\r\n" + HEAD.lower() + b"\r\n\r\ndata\r\n--b--",
}

ENCODED = b"--b\r\n" + HEAD + b"\r\nContent-Transfer-Encoding: %s\r\n\r\n!\r\n--b--"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_what_the_standards_allow_is_read_in_any_pieces(form: str, size: int) -> None:
    [(headers, data)] = parts(FORMS[form], size)
    assert data == b"data"
    assert b'name="image"' in headers[b"content-disposition"]
    assert images(FORMS[form]) == [b"data"]


def test_data_may_hold_whatever_is_no_boundary() -> None:
    chance = random.Random(0)
    pieces = [b"\r\n", b"--b", b"--", b"\r", b"\n", b"-", b" ", b"b", b"\r\n--b-", b"\r\n--bb\r\n", b"\0"]
    for _ in range(300):
        wanted = [b"".join(chance.choices(pieces, k=chance.randrange(12))).rstrip(b"\r-b \n") + b"." for _ in range(3)]
        if any(b"\r\n--b--" in data or b"\r\n--b\r\n" in data or b"\r\n--b \r\n" in data for data in wanted):
            continue
        body = b"".join(b"--b\r\n" + HEAD + b"\r\n\r\n" + data + b"\r\n" for data in wanted) + b"--b--\r\n"
        for size in (1, 2, 5, 64, 10_000):
            assert [data for _, data in parts(body, size)] == wanted, (body, size)


def test_a_message_of_pythons_email_package_is_read_as_it_reads_it() -> None:
    data = random.Random(0).randbytes(5000)
    message = email.mime.multipart.MIMEMultipart("form-data", boundary="b")
    part = email.mime.image.MIMEImage(data, "jpeg")
    part.add_header("Content-Disposition", "form-data", name="picture", filename="a.jpg")
    message.attach(part)
    body = message.as_bytes(policy=message.policy.clone(linesep="\r\n")).split(b"\r\n\r\n", 1)[1]
    assert part["Content-Transfer-Encoding"] == "base64"
    assert images(body) == [data]


@pytest.mark.parametrize(
    "disposition",
    [
        'form-data; name="file"; filename="a.jpg"',
        "form-data; filename=a.jpg",
        "form-data; name=x; filename*=UTF-8''%c3.jpg",
    ],
)
def test_a_file_field_may_have_any_name(disposition: str) -> None:
    body = b"--b\r\nContent-Disposition: " + disposition.encode() + b"\r\n\r\ndata\r\n--b--"
    assert images(body) == [b"data"]


def test_so_may_a_part_that_says_it_is_a_picture() -> None:
    assert images(b'--b\r\nContent-Disposition: form-data; name="x"\r\nContent-Type: image/png\r\n\r\nd\r\n--b--') == [
        b"d"
    ]


@pytest.mark.parametrize("encoding", ["base64", "Base64", "quoted-printable", "binary", "8bit", "7BIT"])
def test_transfer_encodings_are_undone(encoding: str) -> None:
    sent = {"base64": b"ZGF0YQ==\r\n", "quoted-printable": b"d=61ta"}.get(encoding.lower(), b"data")
    head = HEAD + b"\r\nContent-Transfer-Encoding: " + encoding.encode()
    assert images(b"--b\r\n" + head + b"\r\n\r\n" + sent + b"\r\n--b--") == [b"data"]


@pytest.mark.parametrize(
    ("body", "error", "says"),
    [
        (ENCODED % b"x-uuencode", UnsupportedMediaType, "x-uuencode"),
        (ENCODED % b"base64", MalformedRequest, "not base64"),
        (b"--b\r\nContent-Disposition: form-data; name=k\r\n\r\n5\r\n--b--", MalformedRequest, "'k', which is no file"),
        (b"--b\r\nno header at all\r\n\r\n5\r\n--b--", MalformedRequest, "no header at all"),
        (b"--b\r\n" + b"X: y\r\n" * 10_000, MalformedRequest, "16384 bytes"),
        (b"--b--", MalformedRequest, "no file field"),
        (b"nothing", MalformedRequest, "ends before"),
        (b"--b\r\n" + HEAD + b"\r\n\r\ndata", MalformedRequest, "ends before"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_named(body: bytes, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        images(body)


@pytest.mark.parametrize("boundary", [b"", b"x" * 257])
def test_a_boundary_has_some_bytes_and_not_too_many(boundary: bytes) -> None:
    with pytest.raises(MalformedRequest, match="boundary"):
        MultipartImages(boundary, max_images=1, max_image_bytes=9)


def test_a_boundary_of_special_characters_is_taken_literally() -> None:
    boundary = b".*[+]()?_,-./:= "[:-1]
    body = b"--" + boundary + b"\r\n" + HEAD + b"\r\n\r\ndata\r\n--" + boundary + b"--"
    assert [data for _, data in parts(body, 3, boundary)] == [b"data"]


def test_no_form_makes_the_parser_keep_more_than_a_header() -> None:
    for endless in (b"preamble ", b"\r\n--b-", b"\r\n--b" + b" " * 300):
        parser = MultipartParser(b"b")
        for _ in range(200):
            assert not list(parser.feed(endless * 100))
        assert len(parser._buffer) < 16 * 1024
