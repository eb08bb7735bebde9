"""A child process that decodes one picture at a time: `python -m service.core.decoder_process FD MEMORY_BYTES`.

No decoder is trusted. The process reads requests from the socket FD and writes answers to it, until the other end
closes. It has neither the model nor the network. It may take no more memory than the request allows, ends with its
parent, and is killed when it takes too long.

A request is a Request as JSON, followed by its `size` bytes of encoded picture. An answer is an Answer as JSON and its
`size` bytes. The length of each JSON precedes it, four bytes, little-endian. The parent takes nothing from here but
numbers, which it checks, and pixels.
"""

import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import threading
from dataclasses import asdict, dataclass
from math import ceil
from time import monotonic, perf_counter, process_time
from typing import Any, Literal

import numpy as np

from model.image import InvalidImage, TooManyPixels, decode_image, to_canvas
from model.metadata import ResizePolicy
from model.types import Detections
from service.drawing import PictureFormat, draw, encode_picture

LENGTH = struct.Struct("<I")
MAX_TEXT = 1000
MIN_SECONDS = 0.05
"""Shortest timeout; 0 would mean not to wait at all."""
MAX_REQUEST_BYTES = 2**32 - 1
"""Largest announced request; the parent is trusted."""
MAX_ANSWER_BYTES = 64 * 1024
"""Largest announced answer; a decoder is not trusted."""


@dataclass(frozen=True)
class Drawing:
    """The detections that are drawn onto the picture, and its encoding."""

    boxes: list[list[float]]
    scores: list[float]
    labels: list[int]
    names: dict[str, str]
    """Names by label, which is text here: JSON has no other keys."""
    picture_format: PictureFormat


@dataclass(frozen=True)
class Request:
    size: int
    max_pixels: int
    memory_bytes: int
    """Memory that it may take above its rest."""
    cpu_seconds: float
    """CPU seconds that all its threads together may take."""
    resize: tuple[int, int, int] | None = None
    """Shorter side, longest side and divisor, if a canvas is wanted."""
    drawing: Drawing | None = None
    """The drawing, if one is wanted. Without a canvas or a drawing the picture comes as it is."""


@dataclass(frozen=True)
class Answer:
    kind: Literal["canvas", "picture", "drawing", "invalid", "too many pixels", "memory"]
    size: int = 0
    canvas_size: tuple[int, int] = (0, 0)
    valid_size: tuple[int, int] = (0, 0)
    original_size: tuple[int, int] = (0, 0)
    seconds: tuple[float, float] = (0, 0)
    """Seconds of decoding and of resizing."""
    text: str = ""
    """The reason why there is no picture."""


def main(descriptor: int, memory_bytes: int) -> None:
    threading.Thread(target=_end_with_parent, args=[descriptor], daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the parent to act on
    at_rest = _address_space()
    resource.setrlimit(resource.RLIMIT_AS, (at_rest + memory_bytes, at_rest + memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with socket.socket(fileno=descriptor) as connection:
        while (header := receive_json(connection, MAX_REQUEST_BYTES)) is not None:
            request = _request(header)
            _limit(resource.RLIMIT_AS, at_rest + min(request.memory_bytes, memory_bytes))
            _limit(resource.RLIMIT_CPU, ceil(process_time() + request.cpu_seconds))
            send(connection, *respond(request, _receive(connection, request.size)))  # nothing of it is kept


def _limit(kind: int, value: int) -> None:
    """Set the soft limit, so that it can be raised for the next picture."""
    resource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))


def _receive(connection: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    receive_into(connection, memoryview(data))
    return bytes(data)


def _end_with_parent(descriptor: int) -> None:
    """End this process, whatever it runs, when the parent's end of the socket closes."""
    poll = select.poll()
    poll.register(descriptor, select.POLLHUP)
    poll.poll()
    os._exit(0)


def respond(request: Request, data: bytes) -> "tuple[Answer, memoryview | bytes]":
    try:
        if request.drawing is not None:
            return _drawing(request, request.drawing, data)
        return _picture(request, data) if request.resize is None else _canvas(request, request.resize, data)
    except TooManyPixels as error:
        return Answer("too many pixels", text=str(error)[:MAX_TEXT]), b""
    except InvalidImage as error:
        if isinstance(error.__cause__, MemoryError):
            return Answer("memory"), b""
        return Answer("invalid", text=str(error)[:MAX_TEXT]), b""
    except MemoryError:
        return Answer("memory"), b""


def _picture(request: Request, data: bytes) -> "tuple[Answer, memoryview]":
    payload = decode_image(data, max_pixels=request.max_pixels)
    height, width, _ = payload.shape
    return Answer("picture", payload.nbytes, original_size=(height, width)), payload.data.cast("B")


def _canvas(request: Request, resize: tuple[int, int, int], data: bytes) -> "tuple[Answer, memoryview]":
    started = perf_counter()
    pixels = decode_image(data, max_pixels=request.max_pixels)
    decoded = perf_counter()
    canvas = to_canvas(pixels, ResizePolicy(*resize))
    seconds = decoded - started, perf_counter() - decoded
    payload = canvas.pixels.data.cast("B")
    return Answer("canvas", len(payload), canvas.canvas_size, canvas.size, canvas.original_size, seconds), payload


def _drawing(request: Request, drawing: Drawing, data: bytes) -> tuple[Answer, bytes]:
    detections = Detections(
        np.array(drawing.boxes, np.float32).reshape(-1, 4),
        np.array(drawing.scores, np.float32),
        np.array(drawing.labels, np.int64),
    )
    pixels = decode_image(data, max_pixels=request.max_pixels)
    picture = draw(pixels, detections, {int(label): name for label, name in drawing.names.items()})
    payload = encode_picture(picture, drawing.picture_format)
    return Answer("drawing", len(payload)), payload


def send(connection: socket.socket, header: "Request | Answer", payload: "bytes | bytearray | memoryview") -> None:
    text = json.dumps(asdict(header)).encode()
    connection.sendall(LENGTH.pack(len(text)) + text)
    connection.sendall(payload)


def receive_json(connection: socket.socket, max_bytes: int, deadline: float | None = None) -> dict[str, Any] | None:
    """Receive a JSON value; None: the other end has closed. ValueError: it is too long, or not JSON."""
    head = bytearray(LENGTH.size)
    if not receive_into(connection, memoryview(head), deadline):
        return None
    [length] = LENGTH.unpack(head)
    if length > max_bytes:
        raise ValueError(f"{length} bytes of JSON; at most {max_bytes} are taken")
    text = bytearray(length)
    receive_into(connection, memoryview(text), deadline)
    values: dict[str, Any] = json.loads(text)
    return values


def receive_into(connection: socket.socket, buffer: memoryview, deadline: float | None = None) -> bool:
    """Fill the buffer; False: the other end has closed."""
    while buffer:
        if deadline is not None:  # of all of it: a timeout is one of each piece
            connection.settimeout(max(deadline - monotonic(), MIN_SECONDS))
        count = connection.recv_into(buffer)
        if deadline is not None and monotonic() > deadline:
            raise TimeoutError
        if not count:
            return False
        buffer = buffer[count:]
    return True


def _request(values: dict[str, Any]) -> Request:
    drawing = values["drawing"]
    return Request(**values | {"drawing": drawing and Drawing(**drawing)})


def _address_space() -> int:
    """Return the bytes of this process's address space."""
    with open("/proc/self/statm") as file:  # noqa: PTH123
        return int(file.read().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
