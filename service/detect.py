"""`python -m service detect`: the service's detections for files, in process, by the same code."""

from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    raise NotImplementedError
