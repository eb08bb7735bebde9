"""How much memory decoding may take, and how much one picture's does."""

import os
from pathlib import Path

from model.formats.size import claimed_pixels

BYTES_PER_PIXEL = 18
"""The most that a decoder takes, its child's resize included: of 50 million pixels 842 MiB for WebP, the dearest."""
JPEG_BYTES_PER_PIXEL = 8
BYTES_PER_DECODER = 450 * 2**20
SHARE_OF_LIMIT = 0.4
"""Of the memory that this process may have; the rest is for the model, uploads and answers."""


def decode_bytes(data: bytes | bytearray, max_pixels: int) -> int:
    """The most memory that decoding this picture takes, by the size that it claims."""
    pixels = claimed_pixels(data)
    is_jpeg = data.startswith(b"\xff\xd8")
    per_pixel = JPEG_BYTES_PER_PIXEL if is_jpeg else BYTES_PER_PIXEL
    return per_pixel * (max_pixels if pixels is None else min(pixels, max_pixels))


def decode_bytes_allowed(decode_threads: int) -> int:
    """Memory of all pictures that are decoded or drawn at once; one that needs more is decoded alone."""
    return min(decode_threads * BYTES_PER_DECODER, int(SHARE_OF_LIMIT * memory_limit()))


def memory_limit(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this process may have: its container's limit, at most the machine's memory."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = (cgroup / name).read_text().strip()
        except OSError:
            continue
        if text.isdecimal():
            return min(machine, int(text))
    return machine
