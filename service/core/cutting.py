"""Cutting a picture into windows, a few at a time, and merging their detections.

Only the worker that has the job calls these functions.
"""

from collections import deque

from model.image import to_canvas
from model.tiles import MAX_TILE, Found, Tiling, merge, num_windows, smallest_tile, together, whole, windows
from model.types import Detections, Pixels
from service.core.job import Job, Part


class TooManyWindows(Exception):
    """The picture has more windows than allowed; the message names the smallest tile that fits."""


def check_windows(size: tuple[int, int], tiling: Tiling, max_windows: int) -> int:
    """Count the windows of a picture of this (height, width). TooManyWindows: they are more than `max_windows`."""
    count = num_windows(*size, tiling)
    if count <= max_windows:
        return count
    height, width = size
    smallest = smallest_tile(height, width, tiling.overlap, max_windows)
    fits = f"no tile up to {MAX_TILE} has so few" if smallest is None else f"the smallest tile that fits is {smallest}"
    raise TooManyWindows(
        f"tile: {tiling.size} with overlap {tiling.overlap:g} cuts this picture of {width} × {height} pixels into "
        f"{count:,} windows; at most {max_windows} are allowed: {fits}"
    )


def begin_cutting(job: Job, tiling: Tiling, picture: Pixels, max_windows: int) -> None:
    """Hold the picture, and plan its canvases: the whole picture, then its windows. TooManyWindows."""
    height, width, _ = picture.shape
    check_windows((height, width), tiling, max_windows)
    job.picture, job.picture_size = picture, (height, width)
    job.uncut = deque([whole(height, width), *windows(height, width, tiling)])


def cut(job: Job) -> list[Part]:
    """Make the canvases of the next windows, as many as the device takes at once; keep the last ones' detections."""
    assert job.picture is not None
    _gather(job)
    model = job.model
    count = min(len(job.uncut), model.detector.lanes * model.max_batch_size)
    next_ones = [job.uncut.popleft() for _ in range(count)]
    resize, picture = model.detector.metadata.resize, job.picture
    parts = [Part(job, to_canvas(window.cut(picture), resize), window=window) for window in next_ones]
    if not job.uncut:
        job.picture = None
    return parts


def merged(job: Job) -> Detections:
    """Merge the detections of all windows, by the job's options: original pixels, best score first."""
    _gather(job)
    assert job.found is not None
    options = job.options
    return merge(
        [job.found],
        nms_threshold=options.nms_threshold,
        max_detections=options.max_detections,
        label_ids=options.label_ids,
    )


def _gather(job: Job) -> None:
    found = [] if job.found is None else [job.found]
    options = job.options
    for part in job.parts:
        assert part.candidates is not None and part.window is not None
        thresholds = {"score_threshold": options.score_threshold, "nms_threshold": options.nms_threshold}
        found.append(Found.of(part.candidates, part.canvas, part.window, job.picture_size, **thresholds))
    job.parts = []
    job.found = together(found) if found else None
