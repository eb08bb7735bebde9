"""The pictures of an inference request: files (BYTES) or frames of RGB (UINT8), in JSON or binary.

BYTES [n] or [n, 1]: in JSON each element is base64; in binary data each element follows its length, 4 bytes
little-endian. UINT8 [height, width, 3] or [n, height, width, 3]: a frame becomes an uncompressed TIFF, so that the
bounds of files apply to it too.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from model.image import InvalidImage, TooManyPixels
from service.api.body.encodings import decode_base64
from service.api.body.large_json import LargeNumbers, LargeString
from service.api.openinference.tensors import INPUT
from service.api.uploads import BodyTooLarge, MalformedRequest

BYTES, UINT8 = "BYTES", "UINT8"
LENGTH_BYTES = 4
"""Bytes before each element of a binary BYTES tensor."""
MAX_DIMENSIONS = 4
TIFF_HEAD_BYTES = 8 + 2 + 12 * 9 + 4 + 6
"""Bytes of a TIFF before its pixels: header, nine tags and the values to which they point."""
SHORT, LONG = 3, 4
"""Types of a TIFF's tags."""


@dataclass(frozen=True)
class Limits:
    """Bounds on the pictures of one request."""

    max_images: int
    max_image_bytes: int
    max_image_pixels: int


@dataclass(frozen=True)
class PictureTensor:
    """The input of a request, with everything checked but its data."""

    datatype: str
    shape: list[int]
    limits: Limits
    data: Any
    binary_bytes: int | None
    """Bytes of its data after the JSON; None: `data` has them."""

    @classmethod
    def read(cls, given: Mapping[str, Any], binary_bytes: Any, limits: Limits) -> Self:
        """Check the input. Raises MalformedRequest, BodyTooLarge, TooManyPixels, InvalidImage."""
        if given.get("name") != INPUT["name"]:
            raise MalformedRequest(f"the input is {given.get('name')!r:.100}; it should be {INPUT['name']!r}")
        if (binary_bytes is None) == (given.get("data") is None):
            raise MalformedRequest("the input should have either data or the parameter binary_data_size")
        if binary_bytes is not None and not _is_size(binary_bytes):
            raise MalformedRequest(f"binary_data_size is {binary_bytes!r:.100}; it should be a number of bytes")
        shape = given.get("shape")
        if not isinstance(shape, list) or not 0 < len(shape) <= MAX_DIMENSIONS or not all(map(_is_size, shape)):
            raise MalformedRequest("the input's shape is not a list of one to four sizes")
        tensor = cls(str(given.get("datatype")), shape, limits, given.get("data"), binary_bytes)
        tensor._check()
        return tensor

    @property
    def count(self) -> int:
        """Number of its pictures."""
        return 1 if self.datatype == UINT8 and len(self.shape) == 3 else self.shape[0]

    @property
    def frame_size(self) -> tuple[int, int]:
        """(height, width) of each frame."""
        return self.shape[-3], self.shape[-2]

    @property
    def frame_bytes(self) -> int:
        return math.prod(self.shape[-3:])

    def _check(self) -> None:
        if self.datatype not in (BYTES, UINT8):
            raise MalformedRequest(f"the input's datatype is {self.datatype!r:.100}; it should be {BYTES} or {UINT8}")
        if self.datatype == BYTES and self.shape[1:] not in ([], [1]):
            raise MalformedRequest(f"the input's shape is {self.shape}; for BYTES it should be [number of images]")
        if self.datatype == UINT8 and (len(self.shape) < 3 or self.shape[-1] != 3):
            raise MalformedRequest(f"the input's shape is {self.shape}; for UINT8 it should be [height, width, 3]")
        if not 0 < self.count <= self.limits.max_images:
            raise MalformedRequest(f"the input has {self.count} images; 1 to {self.limits.max_images} are allowed")
        if self.datatype == UINT8:
            self._check_frames()
        elif self.binary_bytes is not None:
            most = self.count * (self.limits.max_image_bytes + LENGTH_BYTES)
            if self.binary_bytes > most:
                raise BodyTooLarge(f"the images have {self.binary_bytes} bytes; {most} are allowed")

    def _check_frames(self) -> None:
        height, width = self.frame_size
        if height * width == 0:
            raise InvalidImage("the image has no pixels")
        if height * width > (most := self.limits.max_image_pixels):
            raise TooManyPixels(f"the image has {width} x {height} pixels; at most {most:,} are allowed")
        expected = self.count * self.frame_bytes
        if self.binary_bytes not in (None, expected):
            raise MalformedRequest(f"binary_data_size is {self.binary_bytes}; {self.shape} has {expected} bytes")


class BinaryPictures:
    """Cuts the binary data of a tensor into encoded pictures as it arrives."""

    def __init__(self, tensor: PictureTensor) -> None:
        assert tensor.binary_bytes is not None
        self._tensor = tensor
        self._bytes_left = tensor.binary_bytes
        self._pictures: list[bytearray] = []
        self._picture_bytes_left = 0
        self._length = bytearray()
        """Received bytes of the next element's length."""

    def feed(self, data: bytes) -> None:
        self._bytes_left -= len(data)
        if self._bytes_left < 0:
            raise MalformedRequest(
                f"the body has more than the {self._tensor.binary_bytes} bytes of binary data that it declares"
            )
        position = 0
        while position < len(data):
            if not self._picture_bytes_left:
                position += self._begin(data[position : position + LENGTH_BYTES])
            taken = data[position : position + self._picture_bytes_left]
            if taken:
                self._pictures[-1] += taken
            self._picture_bytes_left -= len(taken)
            position += len(taken)

    def finish(self) -> list[bytearray]:
        complete = not (self._bytes_left or self._picture_bytes_left or self._length)
        if not complete or len(self._pictures) != self._tensor.count:
            raise MalformedRequest(f"the binary data ends before its {self._tensor.count} images do")
        return self._pictures

    def _begin(self, data: bytes) -> int:
        """Begin a picture if all of its length has come; return how many bytes of the data it took."""
        taken = 0
        if self._tensor.datatype == UINT8:
            self._picture_bytes_left = self._tensor.frame_bytes
            self._pictures.append(tiff_head(*self._tensor.frame_size))
            return taken
        taken = LENGTH_BYTES - len(self._length)
        self._length += data[:taken]
        if len(self._length) == LENGTH_BYTES:
            self._picture_bytes_left = int.from_bytes(self._length, "little")
            self._length.clear()
            if self._picture_bytes_left > (most := self._tensor.limits.max_image_bytes):
                raise BodyTooLarge(f"an image has {self._picture_bytes_left} bytes; {most} are allowed")
            if len(self._pictures) == self._tensor.count:
                raise MalformedRequest(f"the binary data has more than {self._tensor.count} images")
            self._pictures.append(bytearray())
        return min(taken, len(data))


def pictures_in_json(tensor: PictureTensor) -> list[bytearray]:
    """Decode `data`. A large frame takes up to a second: not for the event loop."""
    if tensor.datatype == UINT8:
        frames, size = _numbers(tensor), tensor.frame_bytes
        head = tiff_head(*tensor.frame_size)
        return [head + frames[start : start + size] for start in range(0, len(frames), size)]
    data = tensor.data
    if not isinstance(data, list) or len(data) != tensor.count:
        raise MalformedRequest(f"the input's data is not a list of the {tensor.count} images that its shape tells")
    return [_file(each, tensor.limits.max_image_bytes) for each in data]


def _file(element: Any, max_image_bytes: int) -> bytearray:
    text = element[0] if isinstance(element, list) and len(element) == 1 else element  # of the shape [n, 1]
    if not isinstance(text, LargeString | str):
        raise MalformedRequest("the input's data is not of strings: base64, or send binary data")
    try:
        file = decode_base64(text.unescaped() if isinstance(text, LargeString) else text.encode("utf-8", "replace"))
    except ValueError as error:
        raise MalformedRequest(f"the input's data is not base64: {error}") from error
    if len(file) > max_image_bytes:
        raise BodyTooLarge(f"an image has more than the {max_image_bytes} bytes allowed")
    return file


def _numbers(tensor: PictureTensor) -> bytearray:
    """Return the bytes of all frames."""
    count = tensor.count * tensor.frame_bytes
    try:
        if isinstance(tensor.data, LargeNumbers):
            return tensor.data.as_uint8(count)
        numbers = np.array(tensor.data)
    except ValueError as error:
        raise MalformedRequest(f"the input's data is not an array of numbers: {error}") from error
    if numbers.dtype.kind not in "iu" or numbers.size != count or numbers.min() < 0 or numbers.max() > 255:
        raise MalformedRequest(f"the input's data is not {count} whole numbers from 0 to 255")
    return bytearray(numbers.astype(np.uint8).tobytes())


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def tiff_head(height: int, width: int) -> bytearray:
    """Write a TIFF up to its pixels, which follow: RGB of 8 bits without compression."""
    tags = [
        (256, LONG, 1, width),
        (257, LONG, 1, height),
        (258, SHORT, 3, TIFF_HEAD_BYTES - 6),  # where the bits per sample stand
        (259, SHORT, 1, 1),  # no compression
        (262, SHORT, 1, 2),  # RGB
        (273, LONG, 1, TIFF_HEAD_BYTES),  # where the pixels stand
        (277, SHORT, 1, 3),  # samples per pixel
        (278, LONG, 1, height),  # rows per strip
        (279, LONG, 1, height * width * 3),
    ]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + struct.pack("<HHH", 8, 8, 8)
    assert len(head) == TIFF_HEAD_BYTES
    return bytearray(head)
