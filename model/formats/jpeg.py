"""Reader of JPEG.

libjpeg-turbo decodes the file, and treats every oddity as an error. If it finds one, the file is copied without the
parts that pixels do not need (stray bytes, texts, thumbnails, bytes after the end) and decoded again, as strictly. An
error that remains concerns the pixels, and the file is refused.

Source: ITU-T T.81, annex B.
"""

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image, JpegImagePlugin

from model.formats import InvalidImage, check_pixels
from model.formats.exif import orientation_in
from model.formats.pillow import rgb_of
from model.types import Pixels

MAX_SCANS = 200
"""Most scans. A progressive JPEG of a few megabytes can name so many that decoding takes hours; real ones have ten."""
MAX_SEGMENTS = 5_000
"""Most segments. Real files have tens, and some hundred if a depth map is cut into pieces of 64 KiB."""
MAX_HEAD_STRAY_BYTES = 1024
"""Most stray bytes between two segments before the first scan: reading the head must not take long."""
MAX_STRAY_BYTES = 32
"""Most stray bytes after the last scan. More are the rest of a scan in which the decoder lost its place, unless all
have one value, which is padding."""

MAX_SOON_PIXELS = 50_000_000
"""Most pixels times scans of a JPEG that is read soon: half a second of one core if sequential, a second if
progressive."""

SOI, EOI, SOS, DRI = 0xD8, 0xD9, 0xDA, 0xDD
APP0, APP1, APP14 = 0xE0, 0xE1, 0xEE
TABLES = (0xC4, 0xCC, 0xDB, DRI)  # Huffman, arithmetic, quantisation, restart interval
FRAMES = tuple(marker for marker in range(0xC0, 0xD0) if marker not in (0xC4, 0xC8, 0xCC))
SEQUENTIAL = (0xC0, 0xC1, 0xC9)
STANDALONE = (0x01, *range(0xD0, 0xD8))
_MARKER = re.compile(rb"\xff[^\x00\xff]")
_END_OF_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_RESTART = re.compile(rb"\xff[\xd0-\xd7]")
_STRAY = re.compile(r"Corrupt JPEG data: (\d+) extraneous bytes before marker 0x(\w\w)")


@dataclass(frozen=True)
class Segment:
    marker: int
    payload: bytes
    scan: bytes = b""
    """The entropy-coded data behind an SOS."""

    def is_frame(self) -> bool:
        return self.marker in FRAMES and len(self.payload) >= 6

    def without_padding(self, padding: bytes) -> "Segment":
        """Return the scan without a run of these equal bytes at its end, but for two, which it may need."""
        kept = self.scan.rstrip(padding[:1])
        is_padded = len(self.scan) - len(kept) >= len(padding)
        return Segment(self.marker, self.payload, kept + padding[:2]) if is_padded else self

    def __bytes__(self) -> bytes:
        return b"\xff%c%s%s%s" % (self.marker, (len(self.payload) + 2).to_bytes(2, "big"), self.payload, self.scan)


@dataclass(frozen=True)
class Structure:
    """A JPEG's segments from the first to its own end marker, without the bytes between and after them."""

    segments: list[Segment]
    complete: bool
    """True: it has an end marker."""

    def frame(self) -> bytes:
        for segment in self.segments:
            if segment.is_frame():
                return segment.payload
        raise InvalidImage("the JPEG has no frame header: it is cut off or damaged")

    def takes_little(self) -> bool:
        """Tell whether decoding takes about a second at most."""
        height, width, components = shape(self.frame())
        scans = sum(segment.marker == SOS for segment in self.segments)
        return components < 4 and height * width * scans <= MAX_SOON_PIXELS

    def exif(self) -> bytes | None:
        for segment in self.segments:
            if segment.marker == APP1 and segment.payload.startswith(b"Exif\0\0"):
                return segment.payload
        return None

    def rebuilt(self, behind_scans: bytes = b"") -> bytes:
        """Make the file again with the parts that pixels need."""
        return b"\xff\xd8" + b"".join(bytes(each) for each in self._needed(behind_scans)) + b"\xff\xd9"

    def _needed(self, behind_scans: bytes) -> Iterator[Segment]:
        for segment in self.segments:
            marker, payload = segment.marker, segment.payload
            if marker == SOS:
                if self._is_sequential():  # some writers leave the three bytes of progression at 0
                    payload = payload[:-3] + b"\0\x3f\0"
                scan = segment.scan
                if behind_scans:
                    scan = _RESTART.sub(lambda found: behind_scans + found[0], scan) + behind_scans
                yield Segment(marker, payload, scan)
            elif marker == APP0 and payload.startswith(b"JFIF\0"):
                yield Segment(marker, b"JFIF\0\1\1\0\0\1\0\1\0\0")
            elif marker == APP14 and payload.startswith(b"Adobe") and len(payload) >= 12:
                yield Segment(marker, payload[:11] + bytes([min(payload[11], self._last_transform())]))
            elif marker in TABLES or marker in FRAMES:
                yield segment

    def without_stray(self, count: int, before: int) -> "Structure | None":
        """Return it without the `count` bytes between a scan and this marker; None if they may be pixels.

        Padding is removed after every scan at once, because each try is a whole decoding.
        """
        following = [*(segment.marker for segment in self.segments[1:]), EOI]
        for segment, marker in zip(self.segments, following, strict=True):
            end = segment.scan[-count:]
            if marker == before and len(set(end)) == 1:
                return Structure([each.without_padding(end) for each in self.segments], self.complete)
        last = self.segments[-1]
        if before == EOI and 0 < min(count, len(last.scan)) <= MAX_STRAY_BYTES:
            shorter = Segment(last.marker, last.payload, last.scan[:-count])
            return Structure([*self.segments[:-1], shorter], self.complete)
        return None

    def _is_sequential(self) -> bool:
        return any(segment.marker in SEQUENTIAL for segment in self.segments)

    def _last_transform(self) -> int:
        """Return the transform that libjpeg assumes for an unknown one: 1 is YCbCr, 2 is YCCK for four components."""
        return 2 if self.frame()[5] == 4 else 1

    def lacks_scans(self) -> bool:
        """Tell whether a component's coefficients lack precision: the file ends between two scans."""
        if not self._is_sequential() and not any(segment.marker in (0xC2, 0xCA) for segment in self.segments):
            return False
        sent = set()
        for segment in self.segments:
            if segment.marker == SOS and len(segment.payload) >= 4:
                *components, first, last, precision = segment.payload[1:]
                if self._is_sequential():
                    first, last, precision = 0, 63, 0
                if precision & 15 == 0:
                    sent |= {(each, k) for each in components[::2] for k in range(first, min(last, 63) + 1)}
        return len(sent) < 64 * self.frame()[5]


def walk(data: bytes | bytearray, *, head: bool = False) -> Iterator[Segment]:
    """Return the segments up to the file's own end marker, the last one. Bytes outside segments are skipped, as
    decoders do. The walk ends at a truncated segment and, in the head, at the first scan or at many stray bytes.

    InvalidImage: too many scans or segments, or a second beginning.
    """
    position, scans, markers = 2, 0, 0
    while found := _MARKER.search(data, position, position + MAX_HEAD_STRAY_BYTES if head else len(data)):
        marker, position = found[0][1], found.end()
        markers += 1
        if scans > MAX_SCANS or markers > MAX_SEGMENTS:
            raise InvalidImage(f"the JPEG has more than {MAX_SCANS} scans or {MAX_SEGMENTS:,} segments")
        if marker in STANDALONE:
            continue
        if marker == SOI:
            raise InvalidImage("the JPEG is damaged: a second one begins inside it")
        if marker == EOI:
            yield Segment(marker, b"")
            return
        end = position + max(2, int.from_bytes(data[position : position + 2], "big"))
        if end > len(data) or (head and marker == SOS):
            return
        scan_end = end
        if marker == SOS:
            scans += 1
            after = _END_OF_SCAN.search(data, end)
            scan_end = after.start() if after else len(data)
        yield Segment(marker, bytes(data[position + 2 : end]), bytes(data[end:scan_end]))
        position = scan_end


def frame_in(data: bytes | bytearray) -> Segment | None:
    """Return the frame header, if it comes before the first scan."""
    return next((each for each in walk(data, head=True) if each.is_frame()), None)


def parse(data: bytes) -> Structure:
    segments = list(walk(data))
    complete = bool(segments) and segments[-1].marker == EOI
    return Structure(segments[:-1] if complete else segments, complete)


def shape(frame: bytes) -> tuple[int, int, int]:
    """Return height, width and number of components of a frame header."""
    return int.from_bytes(frame[1:3], "big"), int.from_bytes(frame[3:5], "big"), frame[5]


def read(data: bytes, max_pixels: int) -> tuple[Pixels, object]:
    return _read(data, parse(data), max_pixels)


def read_soon(data: bytes, max_pixels: int) -> tuple[Pixels, object] | None:
    """Read as `read` does, if the segments show that reading or refusing takes about a second at most; else None."""
    structure = parse(data)
    return _read(data, structure, max_pixels) if structure.takes_little() else None


def _read(data: bytes, structure: Structure, max_pixels: int) -> tuple[Pixels, object]:
    frame = structure.frame()
    height, width, components = shape(frame)
    check_pixels(width, height, max_pixels)
    if frame[0] != 8:
        raise InvalidImage(f"a JPEG of {frame[0]} bits per sample is not read: send 8")
    if components not in (1, 3, 4):
        raise InvalidImage(f"a JPEG of {components} components is not read: send grey, colour or CMYK")
    if not structure.complete and structure.lacks_scans():
        raise InvalidImage("the JPEG is cut off: it ends before its last scan")
    try:
        if not structure.complete:
            raise ValueError("Premature end of JPEG file")
        pixels = _decode(data, components, max_pixels)
    except ValueError:
        pixels = _decode_rebuilt(structure, components, max_pixels)
    return pixels, orientation_in(structure.exif())


def _decode(data: bytes, components: int, max_pixels: int) -> Pixels:
    """Decode strictly: ValueError for anything of which libjpeg would warn."""
    # Asked again: in a file made to deceive, two parsers may find two headers.
    height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    check_pixels(width, height, max_pixels)
    if components < 4:
        pixels: Pixels = simplejpeg.decode_jpeg(data, colorspace="RGB")
        return pixels
    inks = 255 - simplejpeg.decode_jpeg(data, colorspace="CMYK")  # stored as Adobe does: 255 is no ink
    return np.array(Image.frombuffer("CMYK", (width, height), inks).convert("RGB"))


def _decode_rebuilt(structure: Structure, components: int, max_pixels: int) -> Pixels:
    for _ in range(3):  # how many bytes are stray depends on how far the decoder has read ahead
        try:
            return _decode(structure.rebuilt(), components, max_pixels)
        except InvalidImage:
            raise
        except ValueError as error:
            reason = str(error)
        if "subsampling" in reason:
            return _decode_any_sampling(structure)
        stray = _STRAY.match(reason)
        if stray is None or (shorter := structure.without_stray(int(stray[1]), int(stray[2], 16))) is None:
            break
        structure = shorter
    raise InvalidImage(f"the JPEG is cut off or damaged: {reason}")


def _decode_any_sampling(structure: Structure) -> Pixels:
    """Decode by Pillow, for samplings that TurboJPEG does not support.

    Pillow silently fills missing pixels with grey. So the file is decoded with different bytes after each scan: if the
    pixels depend on them, the file has too few bytes.
    """
    first, second = (_decode_with_pillow(structure.rebuilt(fill * 32)) for fill in (b"\0", b"\xaa"))
    if not np.array_equal(first, second):
        raise InvalidImage("the JPEG is cut off or damaged: some of its pixels are missing")
    return first


def _decode_with_pillow(data: bytes) -> Pixels:
    with JpegImagePlugin.JpegImageFile(io.BytesIO(data)) as image:
        return rgb_of(image)
