"""Receives request bodies, and takes the encoded images out of them. Every byte is counted before it is kept.

A body is the raw bytes of one image, multipart/form-data with file fields, or JSON {"image": "<base64>"}. It is refused
while it arrives: by its Content-Length, its size so far, the total of all bodies being received, or its deadline.
Multipart is parsed as it arrives, in memory: nothing is spooled to disk.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers

from service.api.body.encodings import TRANSFER_ENCODINGS, decode_base64
from service.api.body.large_json import LargeString, parse_json
from service.api.body.multipart import MultipartParser
from service.core.memory import HeldBytes

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

FIELD = "image"
OVERHEAD_BYTES = 64 * 1024
"""Bytes that a form may add to its images: boundaries and part headers."""
PLAIN = frozenset({"", "7bit", "8bit", "binary"})
"""Transfer encodings that change nothing."""
_FILE_NAME = re.compile(rb";\s*filename[*0-9]*\s*=", re.IGNORECASE)
ENCODED = 1.4
"""Bytes of text for each byte of an image: 4/3 for base64, and line breaks."""
PARAMETERS_HINT = "parameters such as score_threshold go into the query"


class MalformedRequest(Exception):
    """The body is not what its Content-Type says, or the image is missing: correct the request."""


class UnsupportedMediaType(Exception):
    """The body's media type is not read: send another."""


class BodyTooLarge(Exception):
    """Send a smaller image, or fewer."""


class UploadTimeout(Exception):
    """The body did not arrive in time: send it faster, or again."""


class ClientGone(Exception):
    """The connection was closed: nobody reads an answer."""


Content = TypeVar("Content", covariant=True)


class Form(Protocol[Content]):
    """A body being parsed."""

    @property
    def takes_long(self) -> bool:
        """True: `finish` is not for the event loop."""

    def feed(self, chunk: bytes) -> None: ...

    def finish(self) -> Content: ...


@dataclass
class RawImage:
    """The body is the image."""

    body: bytearray = field(default_factory=bytearray)  # a list of one-byte chunks would take 40 times its size
    takes_long: bool = False

    def feed(self, chunk: bytes) -> None:
        self.body += chunk

    def finish(self) -> list[bytearray]:
        if not self.body:
            raise MalformedRequest("the body is empty: it should be the bytes of an image")
        return [self.body]


@dataclass
class JsonImage(RawImage):
    """{"image": "<base64>"}, in any variant of base64. A subclass may name the image otherwise and read more."""

    takes_long: bool = True
    max_image_bytes: int = 0
    name: str = FIELD
    parameters: dict[str, Any] = field(default_factory=dict)
    """Other members of the JSON, known when the body is finished."""

    def finish(self) -> list[bytearray]:
        try:
            document = parse_json(self.body)
        except (ValueError, RecursionError) as error:
            raise MalformedRequest(f"the body is not JSON that is read here: {error}") from error
        text = document.pop(self.name, None) if isinstance(document, dict) else None
        if not isinstance(text, LargeString | str):
            raise MalformedRequest(f'the body is not of the form {{"{self.name}": "<base64>"}}')
        self.read_others(document)
        return [self._decode(text)]

    def read_others(self, others: dict[str, Any]) -> None:
        """Take the members besides the image. MalformedRequest: a member is unknown."""
        if others:
            raise MalformedRequest(f"the body has keys besides {self.name!r}; {PARAMETERS_HINT}")

    def _decode(self, text: LargeString | str) -> bytearray:
        try:
            image = decode_base64(
                text.unescaped() if isinstance(text, LargeString) else text.encode("utf-8", "replace")
            )
        except ValueError as error:
            raise MalformedRequest(f"{self.name!r} is not base64: {error}") from error
        _check_size(image, self.max_image_bytes)
        return image


class MultipartImages:
    """The file parts, in order, parsed as they arrive: parts with a file name or a picture's type, or named `image`.

    `finish` takes long if a part has a transfer encoding: not for the event loop.
    """

    def __init__(self, boundary: bytes, *, max_images: int, max_image_bytes: int) -> None:
        self._max_images = max_images
        self._max_image_bytes = max_image_bytes
        self._images: list[bytearray] = []
        self._encodings: list[str] = []
        try:
            self._parser = MultipartParser(boundary)
        except ValueError as error:
            raise MalformedRequest(f"the multipart boundary is not valid: {error}") from error

    @property
    def takes_long(self) -> bool:
        return not PLAIN.issuperset(self._encodings)

    def feed(self, chunk: bytes) -> None:
        try:
            for event in self._parser.feed(chunk):
                if isinstance(event, bytes):
                    self._add(event)
                else:
                    self._begin_part(event)
        except ValueError as error:
            raise MalformedRequest(f"the multipart body is malformed: {error}") from error

    def finish(self) -> list[bytearray]:
        if not self._parser.ended:
            raise MalformedRequest("the multipart body ends before its last boundary")
        if not self._images:
            raise MalformedRequest(f"the form has no file field, such as {FIELD!r}")
        return [self._decode(image, encoding) for image, encoding in zip(self._images, self._encodings, strict=True)]

    def _begin_part(self, headers: Mapping[bytes, bytes]) -> None:
        disposition = headers.get(b"content-disposition", b"")
        _, options = parse_options_header(disposition)
        name = options.get(b"name", b"").decode("latin-1")
        is_file = _FILE_NAME.search(disposition) is not None or name == FIELD
        if not is_file and not headers.get(b"content-type", b"").lower().startswith(b"image/"):
            raise MalformedRequest(f"the form has a field {name!r}, which is no file; {PARAMETERS_HINT}")
        if len(self._images) == self._max_images:
            raise MalformedRequest(f"the form has more than {self._max_images} file(s)")
        encoding = headers.get(b"content-transfer-encoding", b"").decode("latin-1").lower()
        if encoding not in TRANSFER_ENCODINGS:
            raise UnsupportedMediaType(f"Content-Transfer-Encoding {encoding!r} is not read: send the image as it is")
        self._images.append(bytearray())
        self._encodings.append(encoding)

    def _add(self, data: bytes) -> None:
        image = self._images[-1]
        image += data
        if self._encodings[-1] in PLAIN:
            _check_size(image, self._max_image_bytes)

    def _decode(self, image: bytearray, encoding: str) -> bytearray:
        try:
            decoded = TRANSFER_ENCODINGS[encoding](image)
        except ValueError as error:
            raise MalformedRequest(f"a part is not {encoding}: {error}") from error
        _check_size(decoded, self._max_image_bytes)
        return decoded


class Uploads:
    """Receives bodies. One for all requests, on the event loop."""

    def __init__(self, *, max_image_bytes: int, held: HeldBytes, timeout_seconds: float) -> None:
        self._max_image_bytes = max_image_bytes
        self._held = held
        self._timeout_seconds = timeout_seconds
        self.bytes_in_flight = 0

    async def receive(
        self, headers: Headers, receive: Receive, *, max_images: int = 1, json: JsonImage | None = None
    ) -> tuple[list[bytearray], int]:
        """Return the images of the body, and the body's size in bytes. Only multipart may hold more than one image.
        `json` reads a JSON body that is not {"image": "<base64>"}.

        Raises MalformedRequest, UnsupportedMediaType, BodyTooLarge, UploadTimeout, MemoryFull, ClientGone.
        """
        form, max_body_bytes = self._form(headers, max_images, json)
        return await self.receive_form(form, max_body_bytes, headers, receive)

    async def receive_form(
        self, form: Form[Content], max_body_bytes: int, headers: Headers, receive: Receive
    ) -> tuple[Content, int]:
        """Return what the form makes of the body, and the body's size in bytes. Raises what `receive` raises."""
        encoding = headers.get("content-encoding", "")
        if {coding.strip().lower() for coding in encoding.split(",")} - {"", "identity"}:
            raise UnsupportedMediaType(f"Content-Encoding {encoding!r} is not read: send the image as it is")
        size = _content_length(headers)
        if size is not None and size > max_body_bytes:
            raise BodyTooLarge(f"the body has {size} bytes; {max_body_bytes} are allowed")
        self._held.check((size or 0) - OVERHEAD_BYTES)  # before it takes the room that smaller ones still find
        try:
            async with asyncio.timeout(self._timeout_seconds):
                size = await self._feed(form, receive, max_body_bytes)
        except TimeoutError as error:
            raise UploadTimeout(f"the body did not arrive within {self._timeout_seconds:g} s") from error
        if not form.takes_long:
            return form.finish(), size
        self._count(size)  # until it is done
        try:
            return await asyncio.to_thread(form.finish), size
        finally:
            self._count(-size)

    def _form(self, headers: Headers, max_images: int, json: JsonImage | None) -> tuple[Form[list[bytearray]], int]:
        """Return the parser of this Content-Type, and how many bytes it may get."""
        media_type, options = parse_options_header(headers.get("content-type", ""))
        if media_type == b"multipart/form-data":
            if not options.get(b"boundary"):
                raise MalformedRequest("the multipart Content-Type has no boundary")
            parts = MultipartImages(options[b"boundary"], max_images=max_images, max_image_bytes=self._max_image_bytes)
            return parts, self.max_body_bytes(int(max_images * self._max_image_bytes * ENCODED))
        if max_images > 1:
            raise UnsupportedMediaType(_expected(media_type, "multipart/form-data"))
        if media_type.startswith(b"image/") or media_type in (b"", b"application/octet-stream"):
            return RawImage(), self._max_image_bytes
        if media_type == b"application/json":
            form = json or JsonImage(max_image_bytes=self._max_image_bytes)
            return form, int(self._max_image_bytes * ENCODED) + OVERHEAD_BYTES
        hint = "image/*, application/octet-stream, multipart/form-data or application/json"
        if media_type == b"application/x-www-form-urlencoded":
            hint += "; with curl: -H 'Content-Type: image/jpeg' --data-binary @FILE, or -F image=@FILE"
        raise UnsupportedMediaType(_expected(media_type, hint))

    def max_body_bytes(self, most: int) -> int:
        """Return the largest body with so many bytes of images."""
        return min(most, self._held.limit) + OVERHEAD_BYTES

    async def _feed(self, form: Form[Any], receive: Receive, max_body_bytes: int) -> int:
        size = 0
        try:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone("the connection was closed during the upload")
                chunk = message.get("body", b"")
                size += len(chunk)
                self._count(len(chunk))
                if size > max_body_bytes:
                    raise BodyTooLarge(f"the body has more than the {max_body_bytes} bytes allowed")
                self._held.check(-OVERHEAD_BYTES)
                form.feed(chunk)
                if not message.get("more_body", False):
                    return size
        finally:
            self._count(-size)

    def _count(self, count: int) -> None:
        self.bytes_in_flight += count
        self._held.change(count)


def _check_size(image: bytearray, max_image_bytes: int) -> None:
    if len(image) > max_image_bytes:
        raise BodyTooLarge(f"the image has more than the {max_image_bytes} bytes allowed")


def _content_length(headers: Headers) -> int | None:
    text = headers.get("content-length", "")
    return int(text) if text.isdecimal() else None


def _expected(media_type: bytes, expected: str) -> str:
    came = f"Content-Type {media_type.decode('latin-1')!r} is not read" if media_type else "no Content-Type is given"
    return f"{came}; send {expected}"
