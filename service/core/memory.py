"""How much memory decoding may take."""

import os
from pathlib import Path

BYTES_PER_DECODER = 450 * 2**20
SHARE_OF_LIMIT = 0.4
"""Share of the memory that this process may have; the rest is for the model, uploads and answers."""


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
